// What Gradio's components do not do: tell that the person writes, reactions in the conversation, and the camera.
(() => {
  const session = () => document.getElementById("session")?.dataset ?? {};
  const post = (path, body) => fetch(`/talk/${session().key}/${path}`, { method: "POST", body });

  // The first letter of a message ends the reading of the reply before it.
  let writing = null; // number of turns at which the person began to write
  document.addEventListener("input", (event) => {
    if (event.target.closest("#message") && writing !== session().turn) {
      writing = session().turn;
      post("writing");
    }
  });

  const clicks = {
    "[data-face]": async (button) => {
      const { column, face } = button.dataset;
      if ((await post(`react/${column}/${face}`)).ok)
        for (const each of button.parentElement.children) each.ariaPressed = String(each === button);
    },
    "[data-camera=start]": () => startCamera(),
    "[data-camera=stop]": () => stopCamera(),
  };
  document.addEventListener("click", (event) => {
    if (event.target.closest?.("#retry, #undo, #back, #again")) writing = null; // and reads again
    for (const [selector, act] of Object.entries(clicks)) {
      const button = event.target.closest?.(selector);
      if (button) act(button);
    }
  });

  // The camera. Only its button asks for it; pictures are drawn only while a reply is read.
  const WIDTH = 640; // pixels, at most
  let stream = null, timer = null;
  const video = document.createElement("video");
  const canvas = document.createElement("canvas");

  async function startCamera() {
    if (stream) return;
    showCamera("starting");
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: WIDTH } }, audio: false });
      for (const track of stream.getTracks()) track.addEventListener("ended", () => stopCamera("It was taken away."));
      video.muted = video.playsInline = true;
      video.srcObject = stream;
      await video.play();
      timer = setInterval(look, 1000);
      showCamera("on");
    } catch (error) {
      stopCamera(`There is no camera (${error.name}).`);
    }
  }

  function stopCamera(problem = "") {
    clearInterval(timer);
    for (const track of stream?.getTracks() ?? []) track.stop();
    stream = video.srcObject = null;
    canvas.width = canvas.height = 0;
    showCamera("off", problem);
  }

  function showCamera(state, problem = "") {
    const camera = document.querySelector(".camera");
    if (!camera) return;
    camera.dataset.state = state;
    camera.querySelector(".problem").textContent = problem;
  }

  async function look() {
    const { phase, reading, turn } = session();
    if (phase !== "talking") return stopCamera();
    if (reading !== "true" || turn === writing) return;
    const scale = Math.min(1, WIDTH / video.videoWidth, WIDTH / video.videoHeight);
    canvas.width = Math.round(video.videoWidth * scale);
    canvas.height = Math.round(video.videoHeight * scale);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(video, 0, 0, canvas.width, canvas.height);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const answer = await post(`frame/${canvas.width}`, pixels).catch(() => null);
    if (!answer?.ok && stream) stopCamera("It was stopped, because this machine does not read faces now.");
  }

  addEventListener("pagehide", () => stopCamera());
})();
