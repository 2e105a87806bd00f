// What is pointed at says its numbers; switches show and hide the curves of their key.
const tip = document.getElementById("tip");
const say = (event) => {
  const mark = event.target.closest("[data-tip]");
  if (!mark) { tip.style.display = "none"; return; }
  tip.textContent = mark.dataset.tip;
  tip.style.display = "block";
  const box = mark.getBoundingClientRect();
  const left = Math.min(box.right + 8, innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left) + scrollX}px`;
  tip.style.top = `${Math.max(8, box.top - tip.offsetHeight - 8) + scrollY}px`;
};
for (const kind of ["mouseover", "focusin", "click"]) document.addEventListener(kind, say);

const switches = [...document.querySelectorAll(".switches input")];
const curves = (key) => document.querySelectorAll(`.curve[data-key="${key}"]`);
const show = (input) => curves(input.value).forEach((curve) => { curve.style.display = input.checked ? "" : "none"; });
const point = (key) => document.querySelectorAll(".curve").forEach((curve) => {
  curve.classList.toggle("faint", key !== null && curve.dataset.key !== key);
});
for (const input of switches) {
  input.addEventListener("change", () => show(input));
  input.parentElement.addEventListener("mouseenter", () => point(input.checked ? input.value : null));
  input.parentElement.addEventListener("mouseleave", () => point(null));
}
for (const button of document.querySelectorAll("button[data-show]")) {
  button.addEventListener("click", () => switches.forEach((input) => {
    input.checked = button.dataset.show === "all" || (button.dataset.show === "few" && input.defaultChecked);
    show(input);
  }));
}
