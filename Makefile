# make demo: draw a small data set, train on it, answer and score its test photographs (about 5 minutes on two CPU cores)
# make data: fetch Kaggle's photographs with the `kaggle` client, or say what that needs
# make test: style, types and tests
# make soak: the long forms of the tests that kill, starve and feed rubbish (about seven minutes)
# make mutants: break four modules in every way that mutmut knows, and see whether the tests notice (half an hour)
# Each installs what it needs into .venv once.
PYTHON ?= python3
RUN = .venv/bin/python
NAME ?= demo
DEMO = --data_dir data/sample --run $(NAME)
MINUTES ?= 4.3

.PHONY: demo data test soak mutants clean

demo: .venv/installed
	$(RUN) -m data.make_sample
	$(RUN) train.py $(DEMO) --stages all --pretrained false --model_name seresnext14 --height 48 --width 96 \
	    --max_minutes $(MINUTES)
	$(RUN) test.py $(DEMO)
	$(RUN) -m benchmarks.baselines data/sample --run $(NAME)

data: .venv/installed
	$(RUN) -m data.kaggle

test: .venv/installed
	.venv/bin/ruff check --quiet .
	.venv/bin/mypy
	$(RUN) -m pytest -q tests

soak: .venv/installed
	SOAK=1 $(RUN) -m pytest -q -s tests/test_killed.py tests/test_failures.py tests/test_hostile.py tests/test_exploits.py tests/test_same_answers.py

mutants: .venv/installed
	.venv/bin/pip install --quiet --disable-pip-version-check 'mutmut>=3.8,<4'
	OMP_NUM_THREADS=1 .venv/bin/mutmut run --max-children 2
	.venv/bin/mutmut results

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	@echo 'Installing into .venv: once, some minutes and some gigabytes.'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf results/demo data/sample
