// What a page cannot do without a script: drop and paste photos, drag a box, show errors of HTMX.
"use strict";

const notice = document.getElementById("notice");

function say(line) {
  notice.textContent = line;
  notice.hidden = !line;
}

// Photos: sent as soon as they are chosen, dropped or pasted.

function send(form) {
  const input = form.querySelector("input[type=file]");
  const photo = input.files[0];
  if (!photo) return;
  if (photo.size > Number(form.dataset.maxBytes)) {
    say(`${photo.name} is too large: at most ${Number(form.dataset.maxBytes) >> 20} MiB are possible.`);
    input.value = "";
    return;
  }
  say("");
  form.querySelector("button").textContent = "Sending …";
  form.requestSubmit();
}

function take(files) {
  const form = document.querySelector("form[data-upload]");
  if (!form || !files.length) return false;
  form.querySelector("input[type=file]").files = files;
  send(form);
  return true;
}

for (const form of document.querySelectorAll("form[data-upload]")) {
  form.querySelector("input[type=file]").addEventListener("change", () => send(form));
}
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  for (const form of document.querySelectorAll(".drop")) form.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget) return;
  for (const form of document.querySelectorAll(".drop")) form.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  take(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  if (take(event.clipboardData.files)) event.preventDefault();
});
// The back button shows a page as it was left.
window.addEventListener("pageshow", (event) => {
  if (!event.persisted) return;
  for (const button of document.querySelectorAll("form[data-upload] button")) {
    button.textContent = "Find the people in it";
  }
});

for (const select of document.querySelectorAll("select[data-submit]")) {
  select.addEventListener("change", () => select.form.requestSubmit());
}

// A box around somebody: by mouse at once, by touch after the switch, because touch also scrolls.

function drawOn(photo) {
  const svg = photo.querySelector("svg");
  const drawn = svg.querySelector(".drawn");
  const form = photo.nextElementSibling;
  const toggle = form.querySelector("[data-draw-switch]");
  let start = null;
  let moved = false;

  const place = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(
      svg.getScreenCTM().inverse());
    const { width, height } = svg.viewBox.baseVal;
    return [Math.min(Math.max(at.x, 0), width), Math.min(Math.max(at.y, 0), height)];
  };
  const corners = (end) => [
    Math.min(start[0], end[0]), Math.min(start[1], end[1]),
    Math.max(start[0], end[0]), Math.max(start[1], end[1])];
  const show = ([left, top, right, bottom]) => {
    drawn.setAttribute("x", left);
    drawn.setAttribute("y", top);
    drawn.setAttribute("width", right - left);
    drawn.setAttribute("height", bottom - top);
  };

  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    const on = photo.classList.toggle("drawing");
    toggle.setAttribute("aria-pressed", on);
  });
  svg.addEventListener("pointerdown", (event) => {
    moved = false;
    const may = event.pointerType === "mouse" ? event.button === 0 : photo.classList.contains("drawing");
    start = may ? place(event) : null;
  });
  svg.addEventListener("pointermove", (event) => {
    if (!start) return;
    const box = corners(place(event));
    const scale = svg.getScreenCTM().a;
    if (!moved && Math.max(box[2] - box[0], box[3] - box[1]) * scale < 6) return;
    if (!moved) svg.setPointerCapture(event.pointerId);
    moved = true;
    show(box);
  });
  svg.addEventListener("pointerup", (event) => {
    if (!start || !moved) { start = null; return; }
    const box = corners(place(event));
    start = null;
    if (box[2] - box[0] < 1 || box[3] - box[1] < 1) { show([0, 0, 0, 0]); return; }
    form.querySelector("input[name=box]").value = box.map((corner) => corner.toFixed(1)).join(",");
    form.requestSubmit();
  });
  svg.addEventListener("pointercancel", () => { start = null; show([0, 0, 0, 0]); });
  svg.addEventListener("dragstart", (event) => event.preventDefault());
  svg.addEventListener("click", (event) => {
    if (moved) event.preventDefault();
  }, true);

  // Whoever is pointed at in the list is shown in the photo.
  const list = form.nextElementSibling;
  if (!list || !list.matches(".people")) return;
  for (const link of list.querySelectorAll("a[data-person]")) {
    const same = svg.querySelector(`a[data-person="${link.dataset.person}"]`);
    for (const name of ["mouseenter", "focus"]) {
      link.addEventListener(name, () => same.classList.add("hover"));
    }
    for (const name of ["mouseleave", "blur"]) {
      link.addEventListener(name, () => same.classList.remove("hover"));
    }
  }
}

function prepare(root) {
  for (const photo of root.querySelectorAll("[data-draw]:not([data-ready])")) {
    photo.dataset.ready = "";
    drawOn(photo);
  }
}

prepare(document);
document.addEventListener("htmx:load", (event) => prepare(event.target.parentElement || document));
document.addEventListener("htmx:responseError", (event) => say(event.detail.xhr.responseText));
document.addEventListener("htmx:sendError", () => say("The server does not answer; is it still running?"));
document.addEventListener("htmx:beforeRequest", () => say(""));
