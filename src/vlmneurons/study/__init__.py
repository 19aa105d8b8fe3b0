"""The study: switch off each group's neurons in turn, and see which questions are harmed.

`knockout` asks every question once with the model as it is, and once under every mask (a set of neurons set to zero),
and keeps every single answer. All effects are computed from those answers: for mask ``m`` and questions of group ``e``

    delta[m, e] = accuracy under mask m - clean accuracy, on the questions of e (in points of 0 to 1)
    self effect       SE(c)  = delta[c, c]
    cross effect      ACE(c) = mean of delta[m, c] over m != c   (what the other masks do to c)
    cross caused             = mean of delta[c, e] over e != c   (what mask c does to the others)
    gap                      = SE - ACE

A selective set of neurons has a self effect far below zero and a cross effect near it.

Source: Zhao et al. 2025 (arXiv 2510.24942), Zhao et al. 2026 (arXiv 2601.03115, arXiv 2608.08772).
"""
