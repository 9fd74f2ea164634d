"""Runs modules of CPython's own tests, one after the other in one process, and appends the verdict
of every test to a file as soon as it is known: the name, a tab, the verdict.

    python_modules.py FILE MODULE...
"""

import os
import sys
import unittest

from test.libregrtest.main import Regrtest, main
from test.support import testresult

VERDICTS = os.path.abspath(sys.argv.pop(1))


def tell(name, verdict):
    # Opened each time: some tests close every descriptor, others fork.
    with open(VERDICTS, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{name}\t{verdict}\n".replace("\r", " "))


def name_of(test):
    # Some tests have an attribute of their own that is called id.
    return unittest.TestCase.id(test) if isinstance(test, unittest.TestCase) else str(test)


class Result(testresult.RegressionTestResult):
    """Tells each verdict. A test that fails in several parts has failed."""

    running = None
    verdict = None

    def startTest(self, test):
        self.running, self.verdict = test, "ok"
        super().startTest(test)

    def stopTest(self, test):
        super().stopTest(test)
        tell(name_of(test), self.verdict)
        self.running = None

    def judge(self, test, verdict):
        if self.running is None:
            # What prepares a class or a module has failed or skipped all of it.
            tell(name_of(test), verdict)
        elif self.verdict == "ok":
            self.verdict = verdict

    def addError(self, test, err):
        self.judge(test, "ERROR")
        super().addError(test, err)

    def addFailure(self, test, err):
        self.judge(test, "FAIL")
        super().addFailure(test, err)

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.judge(test, "FAIL")
        super().addSubTest(test, subtest, err)

    def addSkip(self, test, reason):
        self.judge(test, "skipped")
        super().addSkip(test, reason)

    def addExpectedFailure(self, test, err):
        self.judge(test, "expected failure")
        super().addExpectedFailure(test, err)

    def addUnexpectedSuccess(self, test):
        self.judge(test, "unexpected success")
        super().addUnexpectedSuccess(test)


class Modules(Regrtest):
    """Tells how each module as a whole has ended."""

    def accumulate_result(self, result, rerun=False):
        tell(f"module {result.name}", type(result).__name__)
        super().accumulate_result(result, rerun)


if __name__ == "__main__":
    testresult.RegressionTestResult = Result
    if hasattr(Regrtest, "accumulate_result"):
        Modules().main()
    else:
        # Later than 3.11: the verdicts of tests must do.
        main()
