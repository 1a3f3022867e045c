(function () {
  "use strict";
  var box = document.getElementById("search");
  var choice = document.getElementById("outcome");
  var count = document.getElementById("count");
  if (!box) { return; }
  var rows = Array.prototype.map.call(document.querySelectorAll("#edits tbody tr"), function (row) {
    // Figures are left out: "7" should find edit 7, not every norm with a 7 in it.
    var words = Array.prototype.map.call(row.querySelectorAll("td:not(.n)"), function (cell) { return cell.textContent; });
    return { row: row, text: words.join(" ").toLowerCase(), outcome: row.getAttribute("data-outcome") };
  });
  var waiting = 0;
  function apply() {
    waiting = 0;
    var words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    var wanted = choice.value;
    var shown = 0;
    rows.forEach(function (entry) {
      var match = (!wanted || entry.outcome === wanted) && words.every(function (word) { return entry.text.indexOf(word) >= 0; });
      if (entry.row.hidden === match) { entry.row.hidden = !match; }
      shown += match ? 1 : 0;
    });
    count.textContent = shown + " of " + rows.length;
  }
  function soon() {
    // One pass per frame, however fast somebody types.
    if (!waiting) { waiting = requestAnimationFrame(apply); }
  }
  box.addEventListener("input", soon);
  choice.addEventListener("change", soon);
  apply();
})();
