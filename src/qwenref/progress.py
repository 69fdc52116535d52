"""What a long run tells of how far it is."""


class Progress:
    """Told by whoever works, heard by nobody; a command that shows it overrides all three."""

    def step(self, name: str) -> None:
        """Say what is being done now."""

    def expect(self, total: int) -> None:
        """Say how many bytes will be gone through in all."""

    def advance(self, count: int) -> None:
        """Say that so many more bytes are done."""


SILENT = Progress()
