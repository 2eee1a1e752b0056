# make demo: draw a small data set, train on it, answer and score its test photographs (about 6 minutes on two CPU cores)
# make test: run the tests. Both install what they need into .venv once.
# make soak: 20,000 cases of broken and hostile input in place of the thousand that make test runs (about 15 minutes)
PYTHON ?= python3
RUN = .venv/bin/python
NAME ?= demo
DEMO = --data_dir data/sample --run $(NAME)
MINUTES ?= 4.3

.PHONY: demo test soak clean

demo: .venv/installed
	$(RUN) -m data.make_sample
	$(RUN) train.py $(DEMO) --stages all --pretrained false --model_name seresnext14 --height 48 --width 96 \
	    --max_minutes $(MINUTES)
	$(RUN) test.py $(DEMO)
	$(RUN) -m benchmarks.baselines data/sample --run $(NAME)

test: .venv/installed
	$(RUN) -m pytest -q tests

soak: .venv/installed
	SOAK=1 $(RUN) -m pytest -q tests/test_hostile.py

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	@echo 'Installing into .venv: once, some minutes and some gigabytes.'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf results/demo data/sample
