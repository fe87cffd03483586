// Makes elements; text is always text, never markup.

/** Return the element with an id. */
export const by = (id) => document.getElementById(id);

/** Return a new element with properties and children, which are elements or text. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
