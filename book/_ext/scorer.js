// How Sphinx's search ranks what it finds: chapters, then pages of reference, then objects of the package. Who types a
// name as only code writes it, with a dot or an underscore inside, looks for the object and gets it first.
var Scorer = {
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: {0: 15, 1: 5, 2: -5},
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
  score: ([page, title, anchor, description, score]) => {
    const query = new URLSearchParams(window.location.search).get("q") || "";
    if (description !== null) return /\w[._]\w/.test(query) ? score + 100 : score - 100;
    return /^(CHANGELOG|CONTRIBUTING)$|\/(api|bibliography)$/.test(page) ? score - 40 : score;
  },
};
