// The stage, where pictures come into focus, and the gallery of this session's finished ones.
// Whatever comes from a prompt is set as text, never as markup.
const MOST = 200; // pictures that the gallery keeps
const note = element.querySelector(".note");
const stage = element.querySelector(".stage");
const gallery = element.querySelector(".gallery");
const thumbs = element.querySelector(".thumbs");
const viewer = element.querySelector(".viewer");
const tiles = new Map(); // those on the stage, by the picture's id
const finished = new Map(); // address of the bytes as they were served, by the picture's id
let number = 0;

// The new image fades in over the old one once it can be painted, so nothing flickers.
async function show(frame, source, alt) {
  if (frame.dataset.source === source) return;
  frame.dataset.source = source;
  const turn = (frame.begun = (frame.begun || 0) + 1);
  const image = make("img");
  image.alt = alt;
  image.src = source;
  const painted = await image.decode().then(() => true, () => false);
  if (!painted || turn < frame.shown) return; // what is there stays: it is all there is, or newer
  frame.shown = turn;
  const before = [...frame.children];
  frame.append(image);
  setTimeout(() => before.forEach((old) => old.remove()), 300);
}

// A finished picture's bytes are kept here: the server forgets them after a while.
async function keep(picture) {
  if (finished.has(picture.id)) return finished.get(picture.id);
  let address = picture.source;
  finished.set(picture.id, address);
  try {
    const reply = await fetch(picture.source);
    if (reply.ok) address = URL.createObjectURL(await reply.blob());
  } catch {
    // the server's own address has to do
  }
  finished.set(picture.id, address);
  return address;
}

function actions(picture, address) {
  const bar = make("span", "actions");
  const download = make("a", "download", "Download");
  download.href = address;
  download.download = picture.file;
  const link = make("a", "link", "Link");
  link.href = picture.link;
  link.target = "_blank";
  link.rel = "noopener";
  link.title = "Opens a page that makes this picture again";
  bar.append(download, link);
  return bar;
}

function tileOf(picture, value) {
  if (tiles.has(picture.id)) return tiles.get(picture.id);
  const tile = make("figure", "tile");
  const frame = make("div", "frame");
  frame.style.aspectRatio = `${value.width} / ${value.height}`;
  const steps = make("div", "steps");
  for (let k = 0; k < value.scales; k++) steps.append(make("i"));
  const caption = make("figcaption");
  caption.append(make("span", "caption"));
  tile.append(frame, steps, caption);
  stage.append(tile);
  tiles.set(picture.id, tile);
  return tile;
}

async function update(picture, value) {
  const tile = tileOf(picture, value);
  const frame = tile.querySelector(".frame");
  [...tile.querySelectorAll(".steps i")].forEach((step, k) => step.classList.toggle("done", k < picture.done));
  tile.querySelector(".caption").textContent = picture.caption || value.note; // of one that waits
  tile.classList.toggle("failed", !!picture.failed);
  if (picture.failed) {
    frame.shown = Infinity;
    frame.replaceChildren();
  }
  if (picture.source && !picture.finished) show(frame, picture.source, picture.caption);
  if (picture.finished && !tile.classList.contains("finished")) {
    tile.classList.add("finished");
    const address = await keep(picture);
    show(frame, address, picture.prompt);
    frame.tabIndex = 0;
    frame.setAttribute("role", "button");
    frame.onclick = () => view(picture, address);
    frame.onkeydown = (event) => event.key === "Enter" && view(picture, address);
    tile.querySelector("figcaption").append(actions(picture, address));
    if (picture.note) tile.append(make("p", "remark", picture.note));
    addThumb(picture, address);
  }
}

function addThumb(picture, address) {
  const thumb = make("button", "thumb");
  thumb.type = "button";
  thumb.title = picture.prompt;
  const image = make("img");
  image.src = address;
  image.alt = `${picture.prompt}, seed ${picture.facts[0][1]}`;
  thumb.append(image);
  thumb.onclick = () => view(picture, address);
  thumbs.prepend(thumb);
  gallery.hidden = false;
  while (thumbs.children.length > MOST) {
    const oldest = thumbs.lastElementChild;
    URL.revokeObjectURL(oldest.firstElementChild.src);
    oldest.remove();
  }
}

function view(picture, address) {
  const image = make("img");
  image.src = address;
  image.alt = picture.prompt;
  viewer.querySelector(".viewer-picture").replaceChildren(image);
  const facts = make("dl");
  for (const [name, fact] of picture.facts) facts.append(make("dt", "", name), make("dd", "", fact));
  const close = make("button", "close", "Close");
  close.type = "button";
  close.onclick = () => viewer.close();
  const bar = actions(picture, address);
  bar.append(close);
  viewer.querySelector(".viewer-text").replaceChildren(make("h3", "", picture.prompt), facts, bar);
  viewer.showModal();
}

viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());

watch("value", () => {
  const value = props.value;
  if (!value || value.number < number) return; // an older run's last words
  number = value.number;
  const busy = value.status === "waiting" || value.status === "running";
  document.querySelector("#create").classList.toggle("busy", busy);
  element.dataset.status = value.status;
  note.textContent = busy ? "" : value.note;
  if (!value.pictures) return; // words alone
  const ids = new Set(value.pictures.map((picture) => picture.id));
  const begins = ![...ids].some((id) => tiles.has(id));
  for (const [id, tile] of tiles) {
    if (!ids.has(id)) {
      tile.remove();
      tiles.delete(id);
    }
  }
  stage.dataset.count = value.pictures.length;
  for (const picture of value.pictures) update(picture, value);
  if (begins && window.innerWidth < 700) stage.scrollIntoView({ behavior: "smooth", block: "center" });
});
