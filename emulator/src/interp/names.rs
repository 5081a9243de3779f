//! Which file and function carries out an instruction, read from the source of `dispatch.rs`.
//!
//! A function pointer does not say its name, and a second table of names could disagree with the first.

use crate::isa::facts;
use crate::vcpu::How;
use iced_x86::Code;
use std::sync::OnceLock;

/// The dispatch table as it was compiled.
const SOURCE: &str = include_str!("dispatch.rs");

/// A row of `dispatch.rs`: `M::A | M::B if i.facts.class == Class::C => module::function,`, or `macro!(i, module::function)`.
pub struct Row {
    mnemonics: Vec<&'static str>,
    /// The row is for this class only.
    pub class: Option<&'static str>,
    /// `module::function`.
    pub function: &'static str,
}

/// All rows, in order.
///
/// # Panics
/// If the source has another shape than one row a line; a test sees to that.
pub fn rows() -> &'static [Row] {
    static ROWS: OnceLock<Vec<Row>> = OnceLock::new();
    ROWS.get_or_init(|| {
        let body = SOURCE.split("match i.iced.mnemonic() {").nth(1).expect("the match");
        let body = body.split("\n    }").next().expect("its end");
        let lines = body.lines().map(|l| l.split("//").next().unwrap_or("").trim()).filter(|l| !l.is_empty());
        lines.map(row).collect()
    })
}

fn row(line: &'static str) -> Row {
    let (pattern, function) = line.split_once("=>").unwrap_or_else(|| panic!("`{line}` is no row"));
    let (mnemonics, guard) = pattern.split_once(" if ").unwrap_or((pattern, ""));
    let class = guard.trim().strip_prefix("i.facts.class == Class::");
    assert!(guard.is_empty() || class.is_some(), "`{line}`: a guard by class, or none");
    Row {
        mnemonics: mnemonics.split('|').map(|m| m.trim().trim_start_matches("M::")).collect(),
        class,
        function: plain(function.trim().trim_end_matches(',')),
    }
}

/// `macro!(i, module::function)` chooses an instance of a function by the instruction's shape.
fn plain(function: &str) -> &str {
    match function.split_once("!(i, ") {
        Some((_, generic)) => generic.trim_end_matches(')'),
        None => function,
    }
}

/// The function for a code, as `module::function`: of the first row that fits.
pub fn function_of(code: Code) -> &'static str {
    let mnemonic = format!("{:?}", code.mnemonic());
    let class = format!("{:?}", facts(code).class);
    let fits = |r: &&Row| r.mnemonics.iter().any(|m| *m == mnemonic || *m == "_") && r.class.is_none_or(|c| c == class);
    rows().iter().find(fits).map_or("undefined", |r| r.function)
}

/// The module of that function.
pub fn module_of(code: Code) -> &'static str {
    function_of(code).split("::").next().expect("a path")
}

/// How the interpreter carries out a code.
pub fn how(code: Code) -> How {
    match function_of(code) {
        "undefined" => How::Unsupported,
        "native::run" => How::Native,
        _ => How::Function,
    }
}

/// Is the module one of a folder's, by the `use` lines of `dispatch.rs`?
fn is_in(folder: &str, module: &str) -> bool {
    let uses = SOURCE.split("use crate::interp::").skip(1).map(|u| u.split(';').next().unwrap_or(""));
    uses.filter_map(|u| u.strip_prefix(folder)?.strip_prefix("::{"))
        .any(|list| list.trim_end_matches('}').split(',').any(|m| m.trim() == module))
}

/// The file of that function, from the root of the workspace, and the function's own name.
pub fn place(code: Code) -> (String, &'static str) {
    let (module, function) = function_of(code).split_once("::").unwrap_or(("dispatch", "undefined"));
    let file = match module {
        "native" => "native/mod".to_string(),
        m if is_in("sensitive", m) => format!("sensitive/{m}"),
        m if is_in("native", m) => format!("native/{m}"),
        m => m.to_string(),
    };
    (format!("emulator/src/interp/{file}.rs"), function.trim_start_matches("r#"))
}
