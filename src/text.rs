//! Text for people: colour on a terminal only, lines of at most 80 columns.

use std::io::IsTerminal;

/// Colours, if standard output is a terminal and NO_COLOR is not set.
#[derive(Clone, Copy)]
pub struct Paint {
    on: bool,
}

impl Paint {
    /// As the surroundings ask for it.
    pub fn auto() -> Paint {
        Paint { on: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() }
    }

    /// The same for what goes to standard error.
    pub fn of_stderr() -> Paint {
        Paint { on: std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none() }
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }

    /// A heading.
    pub fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    /// As it should be.
    pub fn good(self, text: &str) -> String {
        self.with("32", text)
    }

    /// Not as it should be.
    pub fn bad(self, text: &str) -> String {
        self.with("31", text)
    }

    /// To be noticed.
    pub fn odd(self, text: &str) -> String {
        self.with("33", text)
    }

    /// Beside the point.
    pub fn dim(self, text: &str) -> String {
        self.with("2", text)
    }
}

/// Columns of a line.
pub const WIDTH: usize = 80;

/// The words in lines of at most [`WIDTH`] columns, the first behind `first`, the others indented as far as that is long.
pub fn wrap(first: &str, words: &str) -> String {
    let indent = first.chars().count();
    let mut out = first.to_string();
    let mut column = indent;
    let mut fresh = true;
    for word in words.split_whitespace() {
        let len = word.chars().count();
        if !fresh && column + 1 + len > WIDTH {
            out.push('\n');
            out.push_str(&" ".repeat(indent));
            column = indent;
            fresh = true;
        }
        if !fresh {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += len;
        fresh = false;
    }
    out.push('\n');
    out
}

/// Text for HTML.
pub fn html(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Nanoseconds as people say them.
pub fn duration(ns: f64) -> String {
    match ns {
        n if n < 10.0 => format!("{n:.1} ns"),
        n if n < 1e3 => format!("{n:.0} ns"),
        n if n < 1e4 => format!("{:.1} us", n / 1e3),
        n if n < 1e6 => format!("{:.0} us", n / 1e3),
        n if n < 1e8 => format!("{:.1} ms", n / 1e6),
        n if n < 1e9 => format!("{:.0} ms", n / 1e6),
        n => format!("{:.2} s", n / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_not_longer_than_they_may_be() {
        let text = wrap("name: ", &"word ".repeat(40));
        assert!(text.lines().all(|l| l.len() <= WIDTH), "{text}");
        assert!(text.lines().skip(1).all(|l| l.starts_with("      word")), "{text}");
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(duration(3.21), "3.2 ns");
        assert_eq!(duration(39_000.0), "39 us");
        assert_eq!(duration(1_500_000.0), "1.5 ms");
    }
}
