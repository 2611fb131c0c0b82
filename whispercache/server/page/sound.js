// The recording: as it can be heard, and as the microphone makes one.

const byId = (id) => document.getElementById(id);

/**
 * The player. Whoever follows it is told where it is.
 */
export class Player {
  constructor() {
    this.audio = byId("player");
    this.followers = [];
    this.frame = 0;
    this.url = "";
    const look = () => this.tell();
    for (const kind of ["timeupdate", "seeking", "pause", "ended"]) {
      this.audio.addEventListener(kind, look);
    }
    // `timeupdate` comes four times a second, and words are shorter than that.
    this.audio.addEventListener("playing", () => this.run());
    this.audio.addEventListener("error", () => this.show(false));
    this.audio.addEventListener("loadedmetadata", () => this.measure());
  }

  /**
   * Offer this recording. A format that the browser does not know is transcribed anyway.
   */
  open(file, followers) {
    this.followers = followers;
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = URL.createObjectURL(file);
    this.audio.src = this.url;
    this.show(true);
  }

  show(canPlay) {
    this.canPlay = canPlay;
    this.audio.hidden = !canPlay;
    byId("player-hint").textContent = canPlay
      ? "A click on a word plays the recording from there. On a time, the arrow keys go on "
        + "by a line, or by a word."
      : "This browser cannot play the recording. That does not matter to the models.";
  }

  /**
   * What a browser records has no length in it; looking for its end finds that.
   */
  measure() {
    if (this.audio.duration !== Infinity) return;
    this.audio.addEventListener("durationchange", () => { this.audio.currentTime = 0; },
      { once: true });
    this.audio.currentTime = Number.MAX_SAFE_INTEGER;
  }

  get time_s() {
    return this.audio.currentTime;
  }

  play(from_s) {
    if (!this.canPlay) return;
    this.seek(from_s);
    // A browser may refuse to play before something was pressed; it then stands there.
    this.audio.play().catch(() => this.tell());
  }

  seek(to_s) {
    if (this.canPlay) this.audio.currentTime = to_s;
  }

  run() {
    cancelAnimationFrame(this.frame);
    this.tell();
    if (!this.audio.paused) this.frame = requestAnimationFrame(() => this.run());
  }

  tell() {
    for (const follower of this.followers) follower.follow(this.time_s);
  }
}

/**
 * The microphone; calls *took* with the recording when it was stopped.
 */
export class Microphone {
  constructor(took) {
    this.took = took;
    this.recorder = null;
    this.since = 0;
  }

  get isOn() {
    return this.recorder !== null;
  }

  get passed_s() {
    return (performance.now() - this.since) / 1000;
  }

  /**
   * Begin. Raises an Error that says why this browser, or its user, does not want to.
   */
  async start() {
    // Browsers have none for pages that come over a network in the clear.
    if (!navigator.mediaDevices || !window.MediaRecorder) {
      throw new Error("The browser gives a microphone to pages of https and localhost only.");
    }
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    } catch (error) {
      throw new Error(error.name === "NotFoundError"
        ? "There is no microphone." : "The browser did not allow the microphone.");
    }
    const pieces = [];
    const recorder = new MediaRecorder(stream);
    recorder.addEventListener("dataavailable", ({ data }) => pieces.push(data));
    recorder.addEventListener("stop", () => {
      for (const track of stream.getTracks()) track.stop();
      this.recorder = null;
      this.took(fileOf(pieces, recorder.mimeType));
    });
    recorder.start();
    this.recorder = recorder;
    this.since = performance.now();
  }

  /**
   * End, and wait until the recording was taken.
   */
  stop() {
    const { recorder } = this;
    return new Promise((resolve) => {
      recorder.addEventListener("stop", resolve, { once: true });
      if (recorder.state === "recording") recorder.stop();
    });
  }
}

function fileOf(pieces, type) {
  const ending = /^audio\/(\w+)/.exec(type)?.[1] ?? "audio";
  const at = new Date().toTimeString().slice(0, 8).replaceAll(":", ".");
  return new File(pieces, `recording ${at}.${ending}`, { type });
}
