# `make demo`, `make test` and `make lint` set up .venv themselves.
# PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv/bin/python
RUFF := ruff>=0.17,<0.18

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	@echo "Setting up .venv; PyTorch may be a large download."
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/ready
	$(VENV) train.py
	$(VENV) score.py
	$(VENV) select.py --method sft
	$(VENV) select.py --method toss
	$(VENV) -m toss.audit.compare
	$(VENV) -m toss.audit.diagnose --run runs/demo > runs/demo/diagnosis.txt
	$(VENV) -m toss.audit.report --run runs/demo

test: .venv/ready
	$(VENV) -m pytest -q

# Every place where a command can be killed, stopped or find the disk full; make test tries some.
torture: .venv/ready
	TOSS_TORTURE=1 $(VENV) -m pytest -q tests/test_torture.py

lint: .venv/ready
	$(VENV) -m pip install --quiet --disable-pip-version-check "$(RUFF)"
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

clean:
	rm -rf .venv runs/demo runs/demo-small

.PHONY: demo test torture lint clean
