"""The one exception a user's mistake raises."""


class QCompilerError(Exception):
    """Something the user gave us is wrong; the message says where and what to do.

    The message is one paragraph: what is wrong, in which file and node, and how to mend it.
    The command line prints it without a traceback and exits with code 2.
    """
