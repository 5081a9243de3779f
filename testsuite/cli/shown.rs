//! The teaching commands: doctor, classify, explain, demo, compare: what they print, as text and as JSON, with and without /dev/kvm.

use bivisor_translator::lower::{adds_up, finds_by_pext};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn bivisor(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bivisor")).args(args).stdin(Stdio::null()).output().expect("bivisor runs")
}

fn text(args: &[&str]) -> String {
    let output = bivisor(args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {} {said}", output.status);
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn json(args: &[&str]) -> Value {
    let text = text(args);
    assert_eq!(text.lines().count(), 1, "{args:?}: one line");
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?}: {e}"))
}

/// Can this host have a confined child?
fn traces() -> bool {
    let missing = json(&["doctor", "--json"])["missing"].to_string();
    let may = !missing.contains("natively");
    if !may {
        println!("SKIPPED where code runs natively: {missing}");
    }
    may
}

/// The text under a heading of docs/json.md.
fn section(command: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/json.md");
    let page = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let heading = format!("## `bivisor {command}");
    let section = page.split("\n## ").map(|s| format!("## {s}")).find(|s| s.starts_with(&heading));
    section.unwrap_or_else(|| panic!("docs/json.md has no `{heading}`"))
}

/// The names in the first column of the table under a heading of docs/json.md.
fn documented(command: &str) -> Vec<String> {
    let section = section(command);
    let mut names: Vec<String> =
        section.lines().filter_map(|l| Some(l.strip_prefix("| `")?.split('`').next()?.to_string())).collect();
    names.sort();
    names
}

fn keys(value: &Value) -> Vec<String> {
    value.as_object().expect("an object").keys().cloned().collect()
}

/// All names in a value, as deep as it is; those of a map by names that are data are left out.
fn names(value: &Value, out: &mut Vec<String>) {
    match value {
        Value::Array(all) => all.iter().for_each(|v| names(v, out)),
        Value::Object(all) => {
            for (name, v) in all {
                if !out.contains(name) {
                    out.push(name.clone());
                }
                match name.as_str() {
                    "unit_costs" => {}
                    _ => names(v, out),
                }
            }
        }
        _ => {}
    }
}

fn fits(text: &str) {
    for line in text.lines() {
        assert!(line.chars().count() <= 80, "{} columns: {line}", line.chars().count());
        assert!(!line.contains('\x1b'), "no colour in a pipe: {line}");
    }
}

#[test]
fn the_json_is_as_documented() {
    for (command, args) in [
        ("doctor", &["doctor", "--json"][..]),
        ("classify", &["classify", "popf", "--json"]),
        ("demo", &["demo", "popf", "--json"]),
        ("compare", &["compare", "pgfault", "cpu", "small boot", "--json"]),
        ("explain", &["explain", "popfq", "--json"]),
    ] {
        let report = json(args);
        assert_eq!(keys(&report), documented(command), "{command}");
        let (section, mut all) = (section(command), Vec::new());
        names(&report, &mut all);
        let missing: Vec<&String> = all.iter().filter(|n| !section.contains(&format!("`{n}`"))).collect();
        assert!(missing.is_empty(), "{command}: docs/json.md does not name {missing:?}");
    }
}

#[test]
fn texts_fit_a_terminal() {
    fits(&text(&["doctor"]));
    fits(&text(&["classify"]));
    fits(&text(&["classify", "popf", "mov seg", "cpuid", "xsetbv"]));
}

/// What a user's code gets from the 18 on Linux (SDM 2; Robin and Irvine 2000; linux/arch/x86/kernel/umip.c), and what the kinds of KVM
/// make of them.
#[test]
fn the_eighteen() {
    let report = json(&["doctor", "--json"]);
    let tried = report["eighteen"].as_array().expect("a list").clone();
    assert_eq!(tried.len(), 18);
    let verdict = |name: &str, where_: &str| {
        let found = tried.iter().find(|t| t["instruction"] == name).unwrap_or_else(|| panic!("no {name}"));
        found[where_]["verdict"].as_str().map(str::to_string)
    };
    if traces() {
        let umip = report["cpu"]["umip"] == true;
        for t in &tried {
            let name = t["instruction"].as_str().expect("a name");
            let expected = match name {
                "SGDT" | "SIDT" | "SLDT" | "SMSW" | "STR" if umip => "dummy",
                "POPF" => "ignored",
                "INT n" => "traps",
                _ => "leaks",
            };
            assert_eq!(verdict(name, "native").as_deref(), Some(expected), "{name} natively");
        }
    }
    for t in &tried {
        let name = t["instruction"].as_str().expect("a name");
        let expected = match (report["kvm"]["kind"].as_str().expect("a kind"), name) {
            ("absent" | "forbidden" | "broken", _) => None,
            ("vt-x" | "svm", _) => Some("right"),
            (_, "SGDT" | "SIDT" | "SLDT" | "SMSW" | "STR") => Some("right"),
            (_, "POPF") => Some("ignored"),
            (_, "INT n") => Some("wrong-exception"),
            _ => Some("leaks"),
        };
        assert_eq!(verdict(name, "kvm").as_deref(), expected, "{name} under KVM");
    }
}

/// Statuses that scripts may rely on, without /dev/kvm and with one that is none: in a mount namespace of its own.
#[test]
fn without_kvm() {
    let binary = env!("CARGO_BIN_EXE_bivisor");
    let run = |mount: &str, rest: &str| {
        let script = format!("{mount} && exec {binary} {rest}");
        Command::new("unshare").args(["-rm", "sh", "-c", &script]).stdin(Stdio::null()).output()
    };
    let absent = "mount -t tmpfs none /dev";
    if !run(absent, "--version").is_ok_and(|o| o.status.success()) {
        println!("SKIPPED without /dev/kvm: this host gives no mount namespace");
        return;
    }
    let cases = [(absent, "absent", 10), ("mount -t tmpfs none /dev && touch /dev/kvm", "broken", 12)];
    for (mount, kind, status) in cases {
        for (rest, expected) in [("--require hardware", status), ("--require kvm", status), ("", 0)] {
            let output = run(mount, &format!("doctor --json {rest}")).expect("unshare runs");
            assert_eq!(
                output.status.code(),
                Some(expected),
                "{kind} {rest}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
            assert_eq!(report["kvm"]["kind"], kind);
            assert_eq!(report["kvm"]["status"], status);
            assert_eq!(report["process"]["engine"], "bt");
            assert_eq!(keys(&report), documented("doctor"));
        }
        for rest in ["doctor", "classify --probe popf", "explain popf", "demo popf", "compare 'small boot'"] {
            let output = run(mount, rest).expect("unshare runs");
            assert!(output.status.success(), "{kind} {rest}: {}", String::from_utf8_lossy(&output.stderr));
            fits(&String::from_utf8_lossy(&output.stdout));
        }
        let output = run(mount, "run --backend kvm true").expect("unshare runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{kind}: {said}");
        assert!(
            said.contains("/dev/kvm") && said.contains("--backend bt") && said.lines().count() == 1,
            "{kind}: {said}"
        );
    }
}

/// A /dev/kvm that this user may not open. Only root can try that, by becoming another user.
#[test]
fn forbidden_kvm() {
    let binary = env!("CARGO_BIN_EXE_bivisor");
    let nobody = |args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", binary]).args(args);
        command.stdin(Stdio::null()).output()
    };
    let report = match nobody(&["doctor", "--json", "--require", "hardware"]) {
        Ok(o) if o.stdout.starts_with(b"{") => {
            (o.status.code(), serde_json::from_slice::<Value>(&o.stdout).expect("JSON"))
        }
        _ => {
            println!("SKIPPED with a forbidden /dev/kvm: only root can become another user");
            return;
        }
    };
    if report.1["kvm"]["kind"] != "forbidden" {
        println!("SKIPPED with a forbidden /dev/kvm: here it is {}", report.1["kvm"]["kind"]);
        return;
    }
    assert_eq!(report.0, Some(11));
    assert!(report.1["advice"].to_string().contains("kvm $USER"), "{}", report.1["advice"]);
    for args in [&["demo", "popf"][..], &["explain", "popf"], &["run", "true"]] {
        let output = nobody(args).expect("setpriv runs");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn classes() {
    let report = json(&["classify", "--json"]);
    let all = report["instructions"].as_array().expect("a list");
    let one = |name: &str| all.iter().find(|e| e["instruction"] == name).unwrap_or_else(|| panic!("no {name}"));
    // SDM 3C 26.1.2, 26.1.3.
    assert_eq!((one("CPUID")["vtx_reason"].as_u64(), &one("CPUID")["vtx_when"]), (Some(10), &"always".into()));
    assert_eq!(one("POPF")["vtx_reason"], Value::Null);
    assert_eq!(one("POPF")["svm"][0], 0x71);
    assert_eq!((&one("POPF")["sensitivity"], &one("POPF")["at_cpl3"]), (&"control".into(), &"runs".into()));
    assert_eq!((&one("SIDT")["sensitivity"], &one("SIDT")["at_cpl3"]), (&"behaviour".into(), &"#GP*".into()));
    assert_eq!(one("LES")["exists"], serde_json::json!([false, true]));
    for verdict in report["verdicts"].as_array().expect("a list") {
        let silent = verdict["silent"].as_array().expect("a list").len();
        let listed = all.iter().filter(|e| {
            let exists = e["exists"][usize::from(verdict["rules"]["bits"] == 32)] == true;
            let umip = e["privilege"] == "CPL 0 if CR4.UMIP" && verdict["rules"]["umip"] == false;
            exists && e["sensitivity"] != "innocuous" && (e["at_cpl3"] == "runs" || umip)
        });
        assert_eq!(listed.count(), silent, "{}", verdict["rules"]);
        assert_eq!(verdict["virtualizable"], false);
    }
    let markdown = text(&["classify", "--markdown"]);
    let rows = markdown.lines().filter(|l| l.starts_with("| ")).count();
    assert_eq!(rows, all.len() + 2);
    assert_eq!(bivisor(&["classify", "nonsense"]).status.code(), Some(2));
}

/// What the host does is what the manual says: the table is not only consistent with itself.
#[test]
fn classes_as_measured() {
    if !traces() {
        return;
    }
    let report = json(&["classify", "--probe", "--json"]);
    for e in report["instructions"].as_array().expect("a list") {
        let (name, measured) = (e["instruction"].as_str().expect("a name"), e["measured"].as_str().expect("measured"));
        let expected: &[&str] = match (name, e["at_cpl3"].as_str().expect("a word")) {
            _ if measured == "not in 64-bit code" => continue,
            // AMD has no SYSENTER in 64-bit code (APM 3).
            ("SYSENTER", _) => &["enters the host's kernel", "#UD"],
            ("SYSCALL", _) => &["enters the host's kernel"],
            ("POPF", _) => &["runs; IF is kept"],
            ("INT1", _) => &["#DB"],
            ("INT3", _) => &["#BP"],
            // The gate has DPL 0.
            ("INT n", _) => &["#GP"],
            // What the host's processor may lack.
            ("RDPID" | "RDRAND" | "RDSEED" | "XGETBV" | "RDFSBASE" | "RDGSBASE" | "WRFSBASE" | "WRGSBASE", _) => {
                &["runs", "#UD"]
            }
            ("INVPCID" | "XSAVES" | "XSAVES64" | "XRSTORS" | "XRSTORS64" | "WBNOINVD", _) => &["#GP", "#UD"],
            (_, "runs") => &["runs"],
            // CR4.TSD and CR4.PCE are the kernel's choice; UMIP is the processor's too.
            (_, "#GP*") => &["runs", "#GP", "traps (UMIP); the kernel answers"],
            (_, other) => &[other],
        };
        assert!(expected.contains(&measured), "{name}: measured {measured}, the manual says {expected:?}");
    }
}

/// What trap-and-emulate shows at each step where it goes wrong: a process of Linux has IF 1 and IOPL 0, CS 33h (SDM 2, POPF;
/// linux/arch/x86/include/asm/segment.h).
#[test]
fn demonstrations() {
    let traces = traces();
    for (demo, wrong) in [("popf", Some(1)), ("redpill", Some(0)), ("pagefault", None), ("balloon", None)] {
        fits(&text(&["demo", demo]));
        let report = json(&["demo", demo, "--json"]);
        let steps = report["steps"].as_array().expect("a list");
        assert!(steps.len() >= 5, "{demo}");
        let hardware = ["vt-x", "svm"].contains(&json(&["doctor", "--json"])["kvm"]["kind"].as_str().expect("a kind"));
        for engine in if hardware { &["interp", "bt", "kvm"][..] } else { &["interp", "bt"] } {
            for step in steps {
                assert_eq!(step["seen"][engine], step["expected"], "{demo}: {} on {engine}", step["code"]);
            }
        }
        if !traces || demo == "balloon" {
            continue;
        }
        assert!(report["failed"].get("trap").is_none(), "{}", report["failed"]);
        let trap = |i: usize| &steps[i]["seen"]["trap"];
        assert_eq!(report["wrong_under_trap"], serde_json::json!(wrong), "{demo}");
        match demo {
            "popf" => {
                // CLI was emulated, but PUSHF shows the host's IF; POPF changed nothing, so the interrupt came while it was off.
                assert_eq!((trap(1), trap(2), trap(3)), (&1.into(), &1.into(), &1.into()));
                let called_popf = report["ledger"]["trap"].to_string().contains("POPF");
                assert!(!called_popf, "POPF never trapped: {}", report["ledger"]);
            }
            "redpill" => assert_eq!(trap(4), 0x33, "mov eax, cs"),
            _ => {
                let ledger = report["ledger"]["trap"].to_string();
                assert!(ledger.contains("[0,\"true page fault\",2]"), "as many as the guest counted: {ledger}");
                assert!(ledger.contains("hidden page fault"), "{ledger}");
            }
        }
    }
}

/// The demonstration is not an engine for work.
#[test]
fn trap_is_refused_for_work() {
    let output = bivisor(&["run", "--backend", "trap", "true"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("demonstration") && said.contains("--backend bt"), "{said}");
}

/// Every operation runs on the software engines (natively where trap-and-emulate can), and the ledger says what left.
#[test]
fn comparison() {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("report.html");
    let names = ["in", "call/ret", "pgfault", "divzero", "popf", "interrupt", "syscall", "small boot"];
    let args = [&["compare", "--json", "--html", path.to_str().expect("plain")][..], &names].concat();
    let report = json(&args);
    let rows = report["operations"].as_array().expect("a list");
    assert_eq!(rows.len(), names.len() - 1);
    let traces = traces();
    for row in rows {
        for engine in if traces { &["interp", "bt", "trap"][..] } else { &["interp", "bt"] } {
            let value = &row["values"][engine];
            assert!(value["median"].is_number(), "{} on {engine}: {}", row["name"], row["failed"]);
        }
        // Every operation has its native value, or the reason why it cannot have one; namespaces change nothing about it.
        let privileged = row["name"] == "in";
        for place in ["native", "container"] {
            let why = &row["failed"][place];
            match place {
                "native" if traces => {
                    assert_eq!(row["values"][place]["median"].is_number(), !privileged, "{}: {why}", row["name"])
                }
                _ => assert!(row["values"][place]["median"].is_number() || why.is_string(), "{row}"),
            }
        }
        assert!(row["sentence"].as_str().is_some_and(|s| s.ends_with('.')), "{row}");
    }
    let ledger = report["ledger"].as_array().expect("a list");
    let of = |operation: &str, engine: &str| {
        let is = |e: &&Value| e["operation"] == operation && e["engine"] == engine;
        ledger
            .iter()
            .filter(is)
            .map(|e| (e["vtx_reason"].as_u64(), e["reason"].as_str().expect("a word")))
            .collect::<Vec<_>>()
    };
    // What an operation is made of, by steps of the interpreter: IN has reason 30, POPF none, a page fault is reason 0 (SDM 3D C).
    assert_eq!(of("in", "interp"), [(Some(30), "IN")]);
    assert_eq!(of("popf", "interp"), [(None, "POPF")]);
    assert_eq!(of("pgfault", "interp"), [(None, "IRET"), (Some(0), "exception 14 delivered")]);
    assert_eq!(of("interrupt", "interp"), [(None, "IRET"), (Some(1), "interrupt 64 delivered"), (Some(30), "OUT")]);
    if traces {
        // POPF is never noticed.
        assert!(of("in", "trap").contains(&(Some(30), "IN")), "{ledger:?}");
        assert!(of("popf", "trap").iter().all(|(_, reason)| *reason != "POPF"), "{ledger:?}");
    }
    if rows[0]["values"]["kvm"]["median"].is_number() {
        assert!(of("in", "kvm").contains(&(Some(30), "to the monitor: IN or OUT (KVM_EXIT_IO)")), "{ledger:?}");
    }
    // The parts of a breakdown are not more than the whole, and the classes' costs are what they are made of.
    for b in report["breakdown"].as_array().expect("a list") {
        let number = |v: &Value| v.as_f64().unwrap_or_else(|| panic!("{b}"));
        let parts: f64 = b["parts"].as_array().expect("a list").iter().map(|p| number(&p["ns"])).sum();
        assert!((parts + number(&b["rest"]) - number(&b["total"])).abs() <= 0.001 * number(&b["total"]) + 0.001, "{b}");
    }
    let call_out = report["unit_costs"]["interp"]["sensitive instruction"].as_f64();
    assert!(call_out.is_some_and(|ns| ns > 0.0), "{}", report["unit_costs"]);
    let machine = &report["machines"][0];
    for engine in ["interp", "bt"] {
        assert!(machine["values"][engine]["median"].is_number(), "{machine}");
    }
    // The report needs nothing from elsewhere.
    let page = std::fs::read_to_string(&path).expect("the report");
    assert!(!page.contains("http") && !page.contains("<script") && !page.contains("src="), "self-contained");
    assert!(page.contains("call/ret") && page.contains("viewport"));
    fits(&text(&["compare", "rdtsc", "cpu"]));
    for wrong in [&["nonsense"][..], &["kernel"]] {
        assert_eq!(bivisor(&[&["compare"], wrong].concat()).status.code(), Some(2), "{wrong:?}");
    }
    for wrong in [&["popf", "--html", "/nonexistent/report.html"][..], &["kernel", "--kernel", "/nonexistent"]] {
        let output = bivisor(&[&["compare"], wrong].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{wrong:?}: {said}");
    }
}

/// Guest and host code side by side: what is called identical is, every place named is there, all engines' functions too.
#[test]
fn explanations() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let exists = |place: &str| {
        let (file, function) = place.split_once(": ").unwrap_or_else(|| panic!("{place}"));
        let source = std::fs::read_to_string(root.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        let defined = [format!("fn {function}("), format!("fn {function}<")];
        assert!(defined.iter().any(|d| source.contains(d)), "{file} has no fn {function}");
    };
    // add rax, rcx; popfq; mov rax, [rbx]; cpuid. And a loop: add rax, [rbx]; jnz back; ret.
    let cases = [
        (
            &["explain", "4801c8 9d 488b03 0fa2", "--json"][..],
            "kernel",
            &["identical", "rewritten", "rewritten", "call-out"][..],
        ),
        (&["explain", "480303 75fb c3", "--json"], "process", &["identical", "rewritten", "rewritten"]),
        (&["explain", "89c8 0f05", "--json"], "kernel", &["identical", "rewritten"]),
        (&["explain", "89c8 0f05", "--for", "process", "--json"], "process", &["identical", "leaves"]),
    ];
    for (args, target, made) in cases {
        let report = json(args);
        let block = &report["blocks"][0];
        assert_eq!(block["target"], target, "{args:?}");
        let lines = block["lines"].as_array().expect("a list");
        let seen: Vec<&str> = lines.iter().map(|l| l["made"].as_str().expect("a word")).collect();
        assert_eq!(seen, made, "{args:?}");
        for l in lines {
            exists(l["place"].as_str().expect("a place"));
            assert!(!l["host"].as_array().expect("a list").is_empty(), "{l}");
            if l["made"] == "identical" {
                assert_eq!(l["host"], serde_json::json!([l["text"]]), "{l}");
            }
        }
        for e in block["instructions"].as_array().expect("a list") {
            exists(e["engines"]["interp_at"].as_str().expect("a place"));
        }
        fits(&text(&args[..args.len() - 1]));
    }
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("page.html");
    let own = format!("{}@main", env!("CARGO_BIN_EXE_bivisor"));
    text(&["explain", &own, "--html", path.to_str().expect("plain")]);
    let page = std::fs::read_to_string(&path).expect("the page");
    assert!(!page.contains("http") && !page.contains("<script"), "self-contained");
    // As text: bytes by GNU as.
    for (given, bytes) in [("mov cr8, rax", "440f22c0"), ("in al, dx", "ec"), ("popf", "9d"), ("cpuid; ret", "0fa2")] {
        let report = json(&["explain", given, "--no-cost", "--json"]);
        assert_eq!(report["blocks"][0]["lines"][0]["bytes"], bytes, "{given}");
    }
    for wrong in ["mov rax", "mov [rax], 1", "mov rax, what"] {
        assert_eq!(bivisor(&["explain", wrong]).status.code(), Some(2), "{wrong}");
    }
    // All forms of a name.
    let forms = json(&["explain", "sldt", "--no-cost", "--json"]);
    assert_eq!(forms["blocks"].as_array().expect("a list").len(), 3);
    let cost = json(&["explain", "popfq", "--json"])["blocks"][0]["cost_ns"].clone();
    assert!(cost["interp"].is_number() && cost["bt"].is_number(), "{cost}");
    assert_eq!(bivisor(&["explain", "nonsense"]).status.code(), Some(2));
}

/// The course's commands, those in its blocks, in order, each once: they end well and print something. Where the page shows what is printed,
/// in a block of text behind the command, it is that; `UPDATE=1` writes it. The translator's code is the same on hosts with a fast PEXT and
/// enough address space.
#[test]
fn the_course_runs() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/course");
    let index = std::fs::read_to_string(dir.join("README.md")).expect("the index");
    let (mut pages, mut shows) = (0, 0);
    let mut done: Vec<Vec<String>> = Vec::new();
    for entry in std::fs::read_dir(&dir).expect("the course") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        let mut page = std::fs::read_to_string(&path).expect("a page");
        if name != "README.md" {
            assert!(index.contains(&format!("]({name})")), "{name} is not in the index");
            pages += 1;
        }
        let lines: Vec<String> = page.lines().filter_map(|l| Some(l.strip_prefix("    bivisor ")?.into())).collect();
        for line in lines {
            let args = words(&line);
            if done.contains(&args) {
                continue;
            }
            let args_: Vec<&str> = args.iter().map(String::as_str).collect();
            let printed = text(&args_);
            assert!(!printed.is_empty(), "{name}: {line}");
            let before = format!("    bivisor {line}\n\n```text\n");
            let shown = page.find(&before).map(|at| at + before.len());
            if let Some((from, end)) = shown.and_then(|from| Some((from, from + page[from..].find("```")?))) {
                shows += 1;
                if std::env::var_os("UPDATE").is_some() {
                    page.replace_range(from..end, &printed);
                    std::fs::write(&path, &page).expect("the page is written");
                } else if finds_by_pext() && !adds_up() {
                    assert_eq!(page[from..end], printed, "{name}: {line}: UPDATE=1 writes it anew");
                } else {
                    println!(
                        "SKIPPED what `{line}` prints: the pages show what a host does that finds branch targets by PEXT and compares"
                    );
                }
            }
            if !args_.iter().any(|a| ["--json", "--markdown"].contains(a)) {
                fits(&printed);
            }
            done.push(args);
        }
    }
    assert_eq!((pages, shows), (10, 4));
    assert!(done.len() >= 15, "only {} commands: are they still found?", done.len());
}

/// A command line's words; quotes hold some together.
fn words(line: &str) -> Vec<String> {
    let mut out = Vec::new();
    for (i, part) in line.split('\'').enumerate() {
        match i % 2 {
            0 => out.extend(part.split_whitespace().map(str::to_string)),
            _ => out.push(part.to_string()),
        }
    }
    out
}

/// Both pages in a real browser, as wide as a phone: they render, and nothing goes to the console.
#[test]
fn pages_in_a_browser() {
    let browser = ["chromium", "chromium-browser", "google-chrome"]
        .into_iter()
        .find(|b| Command::new(b).arg("--version").output().is_ok_and(|o| o.status.success()));
    let Some(browser) = browser else {
        println!("SKIPPED in a browser: there is no chromium");
        return;
    };
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (report, page) = (dir.join("browser-report.html"), dir.join("browser-page.html"));
    text(&["compare", "popf", "--html", report.to_str().expect("plain")]);
    text(&["explain", "4801c8 9d 0fa2", "--html", page.to_str().expect("plain")]);
    for (file, word) in [(report, "Operations of a ring-0 guest"), (page, "call-out")] {
        let output = Command::new(browser)
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--window-size=400,1600",
                "--enable-logging=stderr",
                "--dump-dom",
            ])
            .arg(format!("file://{}", file.display()))
            .stdin(Stdio::null())
            .output()
            .expect("the browser runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("CONSOLE"), "{}: {said}", file.display());
        assert!(String::from_utf8_lossy(&output.stdout).contains(word), "{}: {said}", file.display());
    }
}
