// A picture is dropped, chosen or pasted, sent as an event's own data, and comes back by both paths.
const drop = element.querySelector(".drop");
const input = element.querySelector("input");
const note = element.querySelector(".note");
const paths = element.querySelector(".paths");
let number = 0;

function send(file) {
  if (!file) return;
  paths.replaceChildren();
  if (file.size > MAX_BYTES) {
    note.textContent = `This picture has ${(file.size / 2 ** 20).toFixed(1)} MB; choose one with at most ${MAX_BYTES / 2 ** 20} MB`;
    return;
  }
  note.textContent = "Sending";
  const reader = new FileReader();
  reader.onload = () => trigger("picture", { base64: reader.result.slice(reader.result.indexOf(",") + 1) });
  reader.onerror = () => (note.textContent = "This file can't be read");
  reader.readAsDataURL(file);
}

input.addEventListener("change", () => {
  send(input.files[0]);
  input.value = ""; // the same file may be chosen again
});
for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  send(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  if (element.offsetParent !== null && event.clipboardData.files.length) send(event.clipboardData.files[0]);
});

watch("value", () => {
  const value = props.value;
  if (!value || value.number < number) return;
  number = value.number;
  element.dataset.status = value.status;
  note.textContent = value.note;
  if (!value.pictures) return;
  paths.replaceChildren(
    ...value.pictures.map((picture) => {
      const figure = make("figure", "tile finished");
      const frame = make("div", "frame");
      const image = make("img");
      image.src = picture.source;
      image.alt = picture.label;
      frame.append(image);
      const caption = make("figcaption");
      const download = make("a", "download", "Download");
      download.href = picture.source;
      download.download = picture.file;
      caption.append(make("strong", "", picture.label), make("span", "caption", picture.caption), download);
      figure.append(frame, caption);
      return figure;
    }),
  );
});
