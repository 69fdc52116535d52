"""The room that compares dumps: orders of axes, measurements, floors, verdicts, reports."""
