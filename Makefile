# `make demo`, `make test` and `make lint` set up .venv themselves.
# PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv/bin/python
RUFF := ruff>=0.17,<0.18
XDIST := pytest-xdist>=3,<4

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	@echo "Setting up .venv; PyTorch may be a large download."
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements.txt "$(XDIST)"
	touch $@

# The demo's methods; TOSS and TOSS-Pro again in a second run, whose D^h is too small to work alone.
ALL := q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj
SMALL := --run runs/demo-small --model data/base --targets $(ALL) --alpha 32 --schedule cosine \
	--max-length 256 --seed 4 --threads 1
ASK := --harmful data/rows/eval_forbidden.jsonl --benign data/rows/eval_benign.jsonl \
	--utility data/rows/eval_facts.jsonl --prefill 0,1,3,5,10

demo: .venv/ready
	$(VENV) train.py
	$(VENV) score.py
	for method in sft random sample sample-all toss; do $(VENV) select.py --method $$method || exit; done
	$(VENV) select.py --pro 1
	$(VENV) -m toss.audit.evaluate --run runs/demo $(ASK)
	$(VENV) train.py $(SMALL) --lr 2e-4 --batch-size 2 --harmful data/rows/harmful_small.jsonl --utility data/rows/utility.jsonl
	$(VENV) score.py --run runs/demo-small --custom data/rows/custom.jsonl --base --threads 1
	$(VENV) select.py $(SMALL) --lr 2e-3 --batch-size 32 --epochs 6
	$(VENV) select.py $(SMALL) --lr 2e-3 --batch-size 32 --epochs 6 --pro 1
	$(VENV) -m toss.audit.evaluate --run runs/demo-small --methods toss,toss-pro --words data/words.txt $(ASK)
	$(VENV) -m toss.audit.compare runs/demo runs/demo-small --out runs/demo/comparison
	$(VENV) -m toss.audit.diagnose --run runs/demo --rows data/rows/harmful.jsonl data/rows/custom.jsonl > runs/demo/diagnosis.txt
	$(VENV) -m toss.audit.report --run runs/demo
	@echo
	@echo "The page: runs/demo/report.html    The method in an hour: toss/walkthrough.ipynb"
	@echo "To try next: $(VENV) -m toss.audit.show --run runs/demo --row 82"

# In two processes of one thread each; `pytest` alone works, too.
test: .venv/ready
	OMP_NUM_THREADS=1 $(VENV) -m pytest -q -n 2

# Every place where a command can be killed, stopped or find the disk full; make test tries some.
torture: .venv/ready
	TOSS_TORTURE=1 $(VENV) -m pytest -q tests/test_torture.py

# Would the tests notice a fault? Each line of tests/mutants.jsonl is tried on a copy: 15 minutes.
mutants: .venv/ready
	$(VENV) tests/mutants.py

# On a GPU, most important first: tests, the benchmark, the scripts on a checkpoint of your own:
#   make gpu MODEL=FOLDER DATA=FOLDER    (DATA holds harmful.jsonl, utility.jsonl, custom.jsonl)
# A part ends after nine minutes at the latest; the others go on. Their output is in runs/gpu.
LIMIT := timeout --signal=INT --kill-after=10 540
BENCH = -$(LIMIT) $(VENV) -m toss.audit.bench --repeats 2 --part

gpu: .venv/ready
	@$(VENV) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "PyTorch finds no GPU here")'
	-$(VENV) -m pip install --quiet --disable-pip-version-check transformers peft
	mkdir -p runs/gpu
	-TOSS_CUDA=1 $(LIMIT) $(VENV) -m pytest -q -rA -s tests/test_cuda.py 2>&1 | tee runs/gpu/tests.txt
	$(BENCH) score 2>&1 | tee runs/gpu/score.md
	$(BENCH) train --rows 192 2>&1 | tee runs/gpu/train.md
ifdef MODEL
	-$(LIMIT) $(VENV) train.py --run runs/gpu/real --model "$(MODEL)" --harmful "$(DATA)/harmful.jsonl" --utility "$(DATA)/utility.jsonl"
	-$(LIMIT) $(VENV) score.py --run runs/gpu/real --custom "$(DATA)/custom.jsonl"
	-$(LIMIT) $(VENV) select.py --run runs/gpu/real --method toss
endif

# Execute toss/walkthrough.ipynb anew and in its place: two minutes on an idle core. The second call
# joins what a cell printed in several parts, which depends on chance.
NOTEBOOK := toss/walkthrough.ipynb
PLAIN := --ExecutePreprocessor.record_timing=False --ClearMetadataPreprocessor.enabled=True \
	--ClearMetadataPreprocessor.preserve_nb_metadata_mask="{'kernelspec', ('language_info', 'name')}"

notebook: .venv/ready
	$(VENV) -m pip install --quiet --disable-pip-version-check --editable ".[notebook]"
	$(VENV) -m nbconvert --execute --to notebook --inplace $(PLAIN) $(NOTEBOOK)
	$(VENV) -m nbconvert --coalesce-streams $(NOTEBOOK)

lint: .venv/ready
	$(VENV) -m pip install --quiet --disable-pip-version-check "$(RUFF)"
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

clean:
	rm -rf .venv runs/demo runs/demo-small

.PHONY: demo test torture mutants gpu notebook lint clean
