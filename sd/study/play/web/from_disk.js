// A plain script: browsers do not load modules of a page that was opened as a file.

if (location.protocol === "file:") {
  document.getElementById("loaded").remove();
  document.getElementById("loading-text").textContent
    = "A page that was opened as a file cannot load the model. Run “sd play”, or “python -m http.server” in this folder, "
    + "and open the address that it prints.";
}
