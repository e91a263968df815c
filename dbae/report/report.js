// A click enlarges a picture to the window; the page needs no script for reading.
for (const img of document.querySelectorAll("figure img")) {
  img.tabIndex = 0;
  img.setAttribute("role", "button");
  const open = () => {
    const box = document.createElement("dialog");
    const copy = img.cloneNode();
    copy.style = `--width: ${img.getAttribute("width")}px; --ratio: ${img.naturalWidth / img.naturalHeight}`;
    copy.removeAttribute("role");
    box.append(copy);
    box.addEventListener("click", () => box.close());
    box.addEventListener("close", () => box.remove());
    document.body.append(box);
    box.showModal();
  };
  img.addEventListener("click", open);
  img.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      open();
    }
  });
}
