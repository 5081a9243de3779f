//! Standard output and error of all subcommands. `println!` and the others of the standard library panic when nobody reads any more; these
//! end the program quietly, with the status that a shell gives to death by SIGPIPE.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};

/// 128 and SIGPIPE.
const NOBODY_READS: i32 = 141;

/// As the standard library's.
macro_rules! print {
    ($($words:tt)*) => { crate::output::out(format_args!($($words)*)) };
}

/// As the standard library's.
macro_rules! println {
    ($($words:tt)*) => { crate::output::out(format_args!("{}\n", format_args!($($words)*))) };
}

/// As the standard library's; what cannot be said is not.
macro_rules! eprintln {
    ($($words:tt)*) => { crate::output::error(format_args!("{}\n", format_args!($($words)*))) };
}

/// Writes to standard output.
pub fn out(words: Arguments<'_>) {
    if let Err(e) = io::stdout().lock().write_fmt(words) {
        if e.kind() != ErrorKind::BrokenPipe {
            error(format_args!("bivisor: standard output: {e}\n"));
        }
        std::process::exit(NOBODY_READS);
    }
}

/// Writes to standard error.
pub fn error(words: Arguments<'_>) {
    let _ = io::stderr().lock().write_fmt(words);
}

fn is_broken_pipe(why: &anyhow::Error) -> bool {
    why.chain().any(|c| {
        let plain = c.downcast_ref::<io::Error>().map(io::Error::kind);
        plain.or_else(|| c.downcast_ref::<serde_json::Error>()?.io_error_kind()) == Some(ErrorKind::BrokenPipe)
    })
}

/// The exit status of a command that failed, after a line about why, if there is somebody to read it.
pub fn status(why: &anyhow::Error) -> i32 {
    if is_broken_pipe(why) {
        return NOBODY_READS;
    }
    error(format_args!("bivisor: {why:#}\n"));
    1
}
