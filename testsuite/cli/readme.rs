//! The README's command lines: subcommands and options exist, cheap examples print what the README says.

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The programs of the README's `bivisor run` lines that any Linux has and that end soon.
const CHEAP: &[&str] = &["cat /etc/hostname", "true"];

fn readme() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Lines of the indented code blocks, without their comments.
fn code(readme: &str) -> Vec<&str> {
    let indented = readme.lines().filter_map(|l| l.strip_prefix("    "));
    indented.map(|l| l.split("  #").next().unwrap_or(l).trim()).filter(|l| !l.is_empty()).collect()
}

/// What the text quotes as code: `bivisor exec --schema`.
fn quoted(readme: &str) -> Vec<&str> {
    let text = readme.lines().filter(|l| !l.starts_with("    "));
    text.flat_map(|l| l.split('`').skip(1).step_by(2)).collect()
}

/// The words after `bivisor` up to a `--`, behind which all is the guest's.
fn own_words(command: &str) -> Option<Vec<&str>> {
    let command = command.split(" | ").map(str::trim).find_map(|part| {
        // `cargo run --release -- run` is bivisor too.
        part.strip_prefix("bivisor ").or_else(|| part.strip_prefix("cargo run --release -- "))
    })?;
    Some(command.split_whitespace().take_while(|w| *w != "--").collect())
}

fn bivisor() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
    command.stdin(Stdio::null());
    command
}

/// Runs a shell's command line in which `bivisor` is ours.
fn shell(line: &str) -> String {
    let directory = Path::new(env!("CARGO_BIN_EXE_bivisor")).parent().expect("a directory");
    let path = format!("{}:{}", directory.display(), std::env::var("PATH").unwrap_or_default());
    let output = Command::new("sh").args(["-c", line]).env("PATH", path).output().expect("a shell");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    text(&output)
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Names of subcommands, or of options, in a help text: the first words of its indented lines.
fn named(help: &str) -> Vec<String> {
    let lines = help.lines().filter(|l| l.starts_with("  ")).map(str::trim);
    lines.flat_map(|l| l.split([' ', ',']).filter(|w| !w.is_empty()).take(2).map(str::to_string)).collect()
}

#[test]
fn every_subcommand_and_option_exists() {
    let readme = readme();
    let all = named(&text(&bivisor().arg("--help").output().expect("bivisor runs")));
    let mut helps: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for command in code(&readme).into_iter().chain(quoted(&readme)) {
        let Some(words) = own_words(command) else { continue };
        let Some((&subcommand, rest)) = words.split_first() else { continue };
        seen += 1;
        if !all.iter().any(|n| n == subcommand) {
            wrong.push(format!("`{command}`: there is no `bivisor {subcommand}`"));
            continue;
        }
        let help = helps
            .entry(subcommand)
            .or_insert_with(|| named(&text(&bivisor().args([subcommand, "--help"]).output().expect("bivisor runs"))));
        // What follows a program is the program's.
        let program = rest.iter().position(|w| w.starts_with('/')).unwrap_or(rest.len());
        for option in rest[..program].iter().filter(|w| w.starts_with('-')) {
            let name = option.split('=').next().unwrap_or(option);
            if !help.iter().any(|n| n == name) {
                wrong.push(format!("`{command}`: `bivisor {subcommand}` has no {name}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen >= 8, "only {seen} commands: are they still found?");
    let help = text(&bivisor().arg("--help").output().expect("bivisor runs"));
    let commands = help.lines().skip_while(|l| *l != "Commands:").skip(1).take_while(|l| !l.is_empty());
    let commands = commands.filter(|l| !l.starts_with("   ")).filter_map(|l| l.split_whitespace().next());
    let missing: Vec<&str> = commands.filter(|c| *c != "help" && !helps.contains_key(c)).collect();
    assert!(missing.is_empty(), "the README does not show {missing:?}");
}

/// A line that begins with `{` is what the command above it prints; `...` stands for anything.
#[test]
fn examples_print_what_the_readme_says() {
    let readme = readme();
    let lines = code(&readme);
    let mut seen = 0;
    for pair in lines.windows(2).filter(|p| p[0].contains("bivisor") && p[1].starts_with('{')) {
        seen += 1;
        let printed = shell(pair[0]);
        serde_json::from_str::<Value>(&printed).unwrap_or_else(|e| panic!("{}: {printed}: {e}", pair[0]));
        let mut rest = printed.trim();
        let pieces: Vec<&str> = pair[1].split("...").map(str::trim).collect();
        for (i, piece) in pieces.iter().enumerate() {
            let at = rest.find(piece);
            let fits = if i == 0 { at == Some(0) } else { at.is_some() };
            assert!(fits, "{} prints {printed}, not {}", pair[0], pair[1]);
            rest = &rest[at.unwrap_or(0) + piece.len()..];
        }
        assert!(rest.is_empty(), "{} prints {printed}, not {}", pair[0], pair[1]);
    }
    assert_eq!(seen, 2, "examples with output");
}

/// What `bivisor exec --help` shows can be pasted: each case runs to its end.
#[test]
fn the_examples_of_exec_s_help_run() {
    let help = text(&bivisor().args(["exec", "--help"]).output().expect("bivisor runs"));
    let lines = help.lines().skip_while(|l| !l.starts_with("Example")).skip(1).take_while(|l| !l.is_empty());
    let mut examples: Vec<String> = Vec::new();
    for line in lines.map(str::trim) {
        match examples.last_mut() {
            // The help is wrapped at spaces.
            Some(last) if !line.starts_with("bivisor") && !line.starts_with("echo") => *last += &format!(" {line}"),
            Some(last) if last.ends_with('|') => *last += &format!(" {line}"),
            _ => examples.push(line.to_string()),
        }
    }
    // Hardware's vectors are not in the tree; testsuite/cli/sst80286.rs runs them where they are.
    examples.retain(|example| !example.contains("--moo"));
    assert!(!examples.is_empty(), "{help}");
    for example in examples {
        let response: Value = serde_json::from_str(&shell(&example)).expect("a JSON line");
        // HLT, or INT3 at CPL 3.
        let ended = response["stop"] == "hlt" || response["exception"]["vector"] == 3;
        assert!(ended, "{example} prints {response}");
    }
}

/// What they print and how they end is as natively; `--strace` and `-v` say something beside it.
#[test]
fn cheap_programs_run() {
    let readme = readme();
    for program in CHEAP {
        let line = code(&readme).into_iter().find(|l| l.starts_with("bivisor run") && l.ends_with(program));
        let line = line.unwrap_or_else(|| panic!("the README runs `{program}`"));
        let native = Command::new("sh").args(["-c", program]).stdin(Stdio::null()).output().expect("a shell");
        let words: Vec<&str> = line.split_whitespace().skip(1).collect();
        let ours = bivisor().args(words).output().expect("bivisor runs");
        assert_eq!((ours.status.code(), text(&ours)), (native.status.code(), text(&native)), "`{line}`");
        let said = String::from_utf8_lossy(&ours.stderr).into_owned();
        assert!(!said.is_empty(), "`{line}` tells nothing on standard error");
    }
}

/// The exit statuses that the README names.
#[test]
fn statuses_are_those_of_the_readme() {
    let status = |args: &[&str]| bivisor().args(args).output().expect("bivisor runs").status;
    assert!(readme().contains("bivisor's own failures are status 1, usage\nerrors 2"), "the README's sentence");
    assert_eq!(status(&["run", "--", "sh", "-c", "exit 7"]).code(), Some(7));
    assert_eq!(status(&["run", "--", "/nonexistent"]).code(), Some(1));
    assert_eq!(status(&["run", "--no-such-option"]).code(), Some(2));
}
