"""Times several ways of doing one thing in one process, in turns, and prints one table of ratios with their spread."""
import time

import pandas as pd
import torch


def compare(ways, count, rounds=5, unit='img/s', cuda=False):
    """`ways`: name -> function that does `count` units of work; the first is what the others are compared with.

    Prints and returns a table: the median of units a second, and the median, least and greatest ratio to the first way
    in the same round.
    """
    for work in ways.values():  # the first time allocates and compiles
        work()
    rates = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            rates[name].append(count / (time.perf_counter() - began))
    rates = pd.DataFrame(rates)
    ratios = rates.div(rates.iloc[:, 0], axis=0)
    table = pd.DataFrame({unit: rates.median(), 'ratio': ratios.median(), 'least': ratios.min(), 'most': ratios.max()})
    print(table.to_string(float_format=lambda value: f'{value:,.2f}' if value < 100 else f'{value:,.0f}'))
    return table
