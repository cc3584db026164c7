/* Search without a server: browsers refuse workers to pages opened from the file system, so theirs runs in a frame. */
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(script) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const frame = this.frame.contentWindow;
      frame.document.open();
      frame.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.ready = new Promise((loaded) => frame.addEventListener("load", loaded, { once: true }));
      frame.document.write(`<script src="${new URL(script, location.href)}"></scr` + "ipt>");
      frame.document.close();
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
