// Keeps a tooltip inside the window, and lets the arrow keys walk from word to word; the rest is CSS.
const tokenOf = (event) => event.target.closest && event.target.closest("#text .tok");
for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, (event) => {
  const token = tokenOf(event);
  if (!token) return;
  const room = document.documentElement.clientWidth - token.getBoundingClientRect().left - 340;
  token.style.setProperty("--shift", Math.min(0, room) + "px");
});
document.addEventListener("keydown", (event) => {
  const token = tokenOf(event);
  if (!token) return;
  const all = [...document.querySelectorAll("#text .tok")], here = all.indexOf(token);
  const there = {ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: all.length - 1}[event.key];
  if (event.key === "Escape") token.blur();
  if (all[there]) { event.preventDefault(); all[there].focus(); }
});
