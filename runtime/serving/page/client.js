// Talks to the server: server-sent events, and the errors that it answers with.

/** What the server refused or failed with; `message` is its own. */
export class ServerError extends Error {
  constructor(status, error, retryAfter = null) {
    super(error?.message || "the server gave no reason");
    this.status = status;
    this.type = error?.type || "";
    this.retryAfter = retryAfter;
  }
}

/** Yield the data of each event in a stream of bytes, whatever pieces it comes in. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // A carriage return at the very end may be the first half of a line's end.
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line !== "" || !data.length) continue;
        yield data.join("\n");
        data = [];
      }
    }
  } finally {
    // It may be broken already, which whoever reads has been told.
    await reader.cancel().catch(() => {});
  }
}

async function refusal(response) {
  const text = await response.text();
  let error = { message: text.trim() || response.statusText };
  try {
    error = JSON.parse(text).error ?? error;
  } catch {
    // Not this server's words, such as a proxy's: they are shown as they are.
  }
  return new ServerError(response.status, error, response.headers.get("Retry-After"));
}

/** Send a request; throws ServerError where it is refused. Paths are relative, so a proxy may put a prefix before them. */
async function request(path, key, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (!response.ok) throw await refusal(response);
  return response;
}

/** Return the models that are served. */
export async function models(key) {
  return (await (await request("v1/models", key)).json()).data;
}

/** Ask, and yield the chunks of the answer; throws unless the answer came to its end. */
export async function* chunks(body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  const options = { stream: true, stream_options: { include_usage: true }, details: true };
  const sent = JSON.stringify({ ...body, ...options });
  const response = await request("v1/chat/completions", key, { method: "POST", headers, body: sent, signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    // The status was sent before anything failed.
    if (chunk.error) throw new ServerError(null, chunk.error);
    yield chunk;
  }
  throw new ServerError(null, { message: "the connection ended before the answer did" });
}
