"""python -m anycard"""

from anycard.cli.main import run

run()
