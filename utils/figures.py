def plot_curves(a, b): pass
def plot_matches(*a, **k): pass
