// The camera: off until it is turned on, and off again when the page is hidden.

// Of a frame's JPEG file.
const QUALITY = 0.92;

/**
 * Return a camera that is shown in a video element.
 *
 * `changed` is called when it goes on or off, with the reason if nobody asked for it.
 */
export function camera(video, changed) {
  let stream = null;

  const release = (one) => one.getTracks().forEach((track) => track.stop());

  /** Turn it off. */
  function stop(reason = "") {
    if (!stream) return;
    release(stream);
    stream = video.srcObject = null;
    changed(reason);
  }

  /** Turn it on; rejects if there is none, or it is not allowed. */
  async function start() {
    if (!navigator.mediaDevices) throw new Error("a browser gives it to pages from https or localhost only");
    const wanted = { facingMode: "environment", width: { ideal: 1280 } };
    const given = await navigator.mediaDevices.getUserMedia({ video: wanted, audio: false });
    // Asked for twice, or hidden while the user was asked.
    if (stream || document.hidden) return release(given);
    stream = given;
    const lost = () => stream === given && stop("The camera is off: it was taken away.");
    for (const track of given.getTracks()) track.addEventListener("ended", lost);
    video.srcObject = given;
    try {
      await video.play();
    } catch (error) {
      stop();
      throw error;
    }
    changed("");
  }

  /** Return what it sees now, as a JPEG file. */
  async function frame() {
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    const file = await new Promise((done) => canvas.toBlob(done, "image/jpeg", QUALITY));
    if (!file) throw new Error("the camera gave no picture");
    return file;
  }

  document.addEventListener("visibilitychange", () => document.hidden && stop("The camera is off: the page was hidden."));
  addEventListener("pagehide", () => stop());
  return { start, stop, frame, isOn: () => stream !== null };
}
