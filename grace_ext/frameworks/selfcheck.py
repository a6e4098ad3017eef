"""Runs cli/selfcheck.py under its former name, which job scripts use: python -m grace_ext.frameworks.selfcheck torch|tensorflow"""

from ..cli.selfcheck import main

if __name__ == "__main__":
    main()
