(function () {
  "use strict";
  function searched(controls) {
    var box = controls.querySelector("input");
    var choice = controls.querySelector("select");
    var count = controls.querySelector("output");
    var table = document.getElementById(controls.getAttribute("data-table"));
    var rows = Array.prototype.map.call(table.querySelectorAll("tbody tr"), function (row) {
      // Figures are left out: "7" should find edit 7, not every norm with a 7 in it.
      var words = Array.prototype.map.call(row.querySelectorAll("td:not(.n)"), function (cell) { return cell.textContent; });
      return { row: row, text: words.join(" ").toLowerCase(), outcome: row.getAttribute("data-outcome") };
    });
    var waiting = 0;
    function apply() {
      waiting = 0;
      var words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      var chosen = choice.value;
      var shown = 0;
      rows.forEach(function (entry) {
        var match = (!chosen || entry.outcome === chosen) && words.every(function (word) { return entry.text.indexOf(word) >= 0; });
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
  }
  Array.prototype.forEach.call(document.querySelectorAll(".controls"), searched);
})();
