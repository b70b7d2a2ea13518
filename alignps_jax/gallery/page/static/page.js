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
  form.requestSubmit();
  Object.assign(form.querySelector("button"), { textContent: "Sending …", disabled: true });
}

function take(files) {
  const form = document.querySelector("form[data-upload]");
  if (!form) say("Photos can be dropped on the first page, and on results to add a view.");
  else if (files.length > 1) say("Please choose one photo at a time.");
  else {
    form.querySelector("input[type=file]").files = files;
    send(form);
  }
}

for (const form of document.querySelectorAll("form[data-upload]")) {
  form.querySelector("input[type=file]").addEventListener("change", () => send(form));
}
for (const [kind, holder] of [["drop", "dataTransfer"], ["paste", "clipboardData"]]) {
  document.addEventListener(kind, (event) => {
    if (!event[holder].files.length) return;
    event.preventDefault();
    take(event[holder].files);
  });
}
document.addEventListener("dragover", (event) => {
  if (event.dataTransfer.types.includes("Files")) event.preventDefault();
});
// The back button shows a page as it was left.
window.addEventListener("pageshow", (event) => {
  if (!event.persisted) return;
  for (const button of document.querySelectorAll("form[data-upload] button")) {
    Object.assign(button, { textContent: "Find people in it", disabled: false });
  }
});

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
  const corners = ([x, y]) => [
    Math.min(start[0], x), Math.min(start[1], y), Math.max(start[0], x), Math.max(start[1], y)];
  const show = ([left, top, right, bottom]) => {
    const values = { x: left, y: top, width: right - left, height: bottom - top };
    for (const [name, value] of Object.entries(values)) drawn.setAttribute(name, value);
  };

  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    toggle.setAttribute("aria-pressed", photo.classList.toggle("drawing"));
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
    const saves = event.shiftKey || form.elements.person?.value;
    form.requestSubmit(saves ? form.querySelector("[formaction]") : null);
  });
  svg.addEventListener("pointercancel", () => { start = null; show([0, 0, 0, 0]); });
  svg.addEventListener("dragstart", (event) => event.preventDefault());
  svg.addEventListener("click", (event) => moved && event.preventDefault(), true);
}

// Whoever is pointed at in the list is shown in the photo.
for (const name of ["pointerover", "focusin"]) {
  document.addEventListener(name, (event) => {
    const link = event.target.closest(".people a");
    for (const one of document.querySelectorAll(".photo a")) {
      one.classList.toggle("hover", one.dataset.person === link?.dataset.person);
    }
  });
}

// Full size in place; without a script the link opens the picture.
document.addEventListener("click", (event) => {
  const link = event.target.closest("[data-zoom]");
  if (!link) return;
  event.preventDefault();
  const photo = link.closest("form").previousElementSibling;
  const svg = photo.querySelector("svg");
  const zoomed = photo.classList.toggle("zoomed");
  const { width, height } = svg.viewBox.baseVal;
  for (const [name, value] of Object.entries({ width, height })) {
    if (zoomed) svg.setAttribute(name, value); else svg.removeAttribute(name);
  }
  if (zoomed) svg.querySelector("image").setAttribute("href", link.href);
  link.textContent = zoomed ? "Fit to the window" : "Full size";
});

// Keys: among results, and in the viewer by the links and buttons that are there.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.closest("input:not([type=checkbox]), select, textarea, video")) return;
  const { key } = event;
  if (key === "?") return document.getElementById("keys").showModal();
  const link = document.querySelector(`[data-key="${key}"]`);
  if (link) return link.click();
  const cards = [...document.querySelectorAll("#list > .card")];
  const card = document.activeElement.closest(".card");
  if ((key === "j" || key === "k") && cards.length) {
    const next = cards[cards.indexOf(card) + (key === "j" ? 1 : card ? -1 : 1)];
    next?.querySelector("a")?.focus();
  }
  const place = card || document.querySelector(".compare");
  if (key === "r" || key === "w") place?.querySelector(key === "r" ? ".right" : ".wrong")?.click();
  if (key === "x") card?.querySelector("input[type=checkbox]")?.click();
  if (key === "Escape") document.getElementById("several")?.reset();
});

// The address says how many results are shown and at which one, so that Back returns there.
document.addEventListener("htmx:afterRequest", (event) => {
  const shown = new URL(event.detail.pathInfo.finalRequestPath, location).searchParams.get("shown");
  if (!shown || !event.detail.successful) return;
  const here = new URL(location);
  here.searchParams.set("shown", shown);
  history.replaceState(null, "", here);
});
document.addEventListener("click", (event) => {
  const card = event.target.closest("#list > .card");
  if (card?.id && event.target.closest("a")) history.replaceState(null, "", `#${card.id}`);
});
document.addEventListener("input", (event) => {
  const output = event.target.type === "range" && event.target.form.querySelector("output");
  if (output) output.value = Number(event.target.value).toFixed(2);
});

function prepare(root) {
  for (const photo of root.querySelectorAll("[data-draw]:not([data-ready])")) {
    photo.dataset.ready = "";
    drawOn(photo);
  }
}

prepare(document);
document.addEventListener("htmx:load", (event) => {
  prepare(event.target.parentElement || document);
  const days = [...document.querySelectorAll(".day")];  // the last one may go on in what came
  days.filter((day, n) => n && day.innerText === days[n - 1].innerText).forEach((day) => day.remove());
});
document.addEventListener("htmx:responseError", (event) => say(event.detail.xhr.responseText));
document.addEventListener("htmx:sendError", () => say("The server does not answer; is it still running?"));
document.addEventListener("htmx:beforeRequest", () => say(""));
