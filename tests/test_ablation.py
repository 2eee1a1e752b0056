"""The ablation's rows can be trained, and the table of those that were says so."""
import pandas as pd

import train
from benchmarks import ablation
from utils.constants import read_constants


def test_every_row_is_of_constants_that_there_are():
    for name, (constants, _) in ablation.ROWS.items():
        given = [f'--{key}={value}' for key, value in constants.items() if key != 'steps']
        assert read_constants(vars(train), given, train.RULES), name


def test_the_table_has_every_row_and_counts_its_seeds(capsys):
    ablation.show(pd.read_csv(ablation.CSV))
    lines = capsys.readouterr().out.splitlines()
    for name in ablation.ROWS:
        assert [line.split(' | ')[-1] for line in lines if line.startswith(f'| {name} |')] == ['3 |'] * 2, name
    assert sum('full strength, batches of 24' in line for line in lines) == 2  # one seed each: in a sentence
