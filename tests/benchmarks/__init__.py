"""What an attribution costs, beside captum, inseq and the naive way, and whether scopes find known causes.

The benchmarks are run on demand, never by a plain `pytest`:

    pip install -e ".[benchmark]" && pip install --no-deps inseq treescope
    OMP_NUM_THREADS=1 pytest -o addopts= tests/benchmarks/bench_*.py --benchmark-json=costs.json
    python -m tests.benchmarks.report costs.json  # the table of docs/costs.md, and demos/cost.png

    python -m tests.benchmarks.by_hand [FOLDER]  # Semantic Scope beside the same gradient written by hand
    python -m tests.benchmarks.passes FOLDER --into docs/costs.md  # what a question costs in forward passes
    python -m tests.benchmarks.gpu --into FOLDER  # where there is a GPU; at most 8 minutes
    python -m tests.benchmarks.throughput FOLDER  # prompts a second in batches, beside captum and inseq
    python -m tests.benchmarks.precision FOLDER --into docs/costs.md  # bfloat16 and float16 against float32
    python -m tests.benchmarks.known_causes_table --into docs/evidence.md  # takes some twenty minutes
    python -m tests.benchmarks.known_causes_table --model FOLDER --into docs/evidence.md docs/decided.md  # some forty
    python -m tests.benchmarks.answers FOLDER --into docs/answers.md  # 1, 8 and 32 tokens; some fifteen minutes
    python -m tests.benchmarks.circuits_table FOLDER --into docs/circuits.md  # carried parts and patching
    python -m tests.benchmarks.fisher  # how far off Fisher Scope's estimate is
    python -m tests.benchmarks.corrections  # which corrections for sinks help; with --sink 0.15 under one made by hand

Where accuracy is measured, what is found at every prompt is stored in `tests/data`: by `known_causes_table` and
`circuits_table`, of which the tables of the pages are made (`tests/test_stored_tables.py` makes them again), and by
`cases_table`, `open_checks`, `series_table` and `translation_table`, whose figures the notebooks show; each has its
command at its top. What the other commands print into the documentation, costs above all, is kept there alone.

`bench_cost.py` alone gives the table of costs, `bench_growth.py` the picture; `-k "Semantic or captum"` picks rows.

inseq is installed without its dependencies: it pins typeguard<=2.13.3, which it never imports, and TransformerLens
needs typeguard>=4.2. Rows whose library is missing are skipped. `-o addopts=` leaves out the run-time type checks.

Every cost is a ratio to a bare forward pass of the same Hugging Face model on the same tokens, measured just before
and just after each round, in CPU time of the process, so that it does not matter what else the machine does. No test
depends on a time.
"""
