"""Pictures of statistics, selections and knockout results.

Every function returns a matplotlib `Figure` and draws nowhere else: no window, no global state, no style changed. The
figure shows itself as the last line of a notebook's cell. Colours are safe for colour-blind readers (Okabe & Ito's,
each with a marker of its own): harm is orange and gain blue, and effects diverge from white at zero.
"""
