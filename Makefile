# The two commands of the README; each does all its own set-up.
.PHONY: demo test lint format clean

demo:
	@scripts/setup.sh
	@.venv/bin/hartist generate "red apple, 3d" "sunflower, flat" "watermelon, noto" "red heart, 3d" -n 2 --seed 7 -o out/demo --save-scales
	@echo "Look at out/demo/contact_sheet.png"

test: lint
	.venv/bin/python -m pytest -n 2 --dist loadfile

lint:
	@scripts/setup.sh test,train,evaluate,serve,filters,ray,report,peers
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format:
	@scripts/setup.sh test,train,evaluate,serve,filters,ray,report,peers
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv out build dist src/*.egg-info
