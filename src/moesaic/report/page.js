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

// A passage is coloured by one layer, or by the mean of all; as report/passage.py does.
for (const choice of document.querySelectorAll("select.layers")) {
  const tokens = [...document.querySelectorAll(".tokens span")], ends = document.querySelectorAll(".end");
  const all = tokens.map((token) => token.dataset.experts.split(" ").map(Number));
  choice.addEventListener("change", () => {
    const one = (own) => choice.value === "" ? own.reduce((a, b) => a + b) / own.length : own[choice.value];
    const found = all.map(one), low = Math.min(...found), high = Math.max(...found);
    tokens.forEach((token, i) => {
      const depth = high > low ? (found[i] - low) / (high - low) : 0;
      const mix = [[240, 11], [244, 79], [250, 138]].map(([pale, dark]) => Math.round(pale + (dark - pale) * depth));
      token.style.background = `rgb(${mix})`;
      token.style.color = depth > 0.55 ? "#fff" : "#1b1b1f";
    });
    [low, high].forEach((end, i) => { ends[i].textContent = choice.value === "" ? end.toFixed(2) : end; });
  });
}
