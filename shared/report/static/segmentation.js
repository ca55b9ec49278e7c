"use strict";
(() => {
  const opacity = document.getElementById("opacity");
  const apply = () => document.getElementById("main").style.setProperty("--opacity", opacity.value / 100);
  opacity.addEventListener("input", apply);
  apply();
})();
