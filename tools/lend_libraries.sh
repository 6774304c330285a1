#!/usr/bin/env bash
# Let a virtual environment import the libraries of another one, behind its own:
#
#   bash tools/lend_libraries.sh LENDER BORROWER
#
# What LENDER has in editable form is not lent: Python reads such links in its own folder only.
set -euo pipefail
folder_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
folder_of "$1" >"$(folder_of "$2")/lent.pth"
