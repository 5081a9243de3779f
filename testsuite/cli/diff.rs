//! `bivisor diff` as built: the campaign's slice of every test run, shards, resuming, wrong use.

use bivisor_emulator::cpu::CpuState;
use bivisor_testsuite::campaign::case::{Case, Kind};
use bivisor_testsuite::campaign::engine::Which;
use bivisor_testsuite::campaign::modes::Modes;
use bivisor_testsuite::campaign::tally::{Divergence, Tally};
use iced_x86::{Code, Mnemonic};
use std::path::Path;
use std::process::{Command, Output};

fn bivisor(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bivisor")).args(args).output().expect("bivisor runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(out: &Output) -> serde_json::Value {
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}{}", text(&out.stdout), text(&out.stderr)))
}

fn has_xsave() -> bool {
    let have = std::is_x86_feature_detected!("xsave");
    if !have {
        eprintln!("SKIPPED: the host CPU has no XSAVE");
    }
    have
}

/// A million cases of a fixed seed on the interpreter, the translator and the host CPU.
#[test]
fn a_million_cases() {
    if !has_xsave() {
        return;
    }
    let out = bivisor(&["diff", "--all", "--cases", "1000000", "--seed", "1"]);
    println!("{}", text(&out.stdout));
    assert_eq!(out.status.code(), Some(0), "{}{}", text(&out.stdout), text(&out.stderr));
}

/// KVM is an engine of kernels where it is hardware, counted by itself; where not, that is said, once.
#[test]
fn kernels_on_kvm() {
    if !has_xsave() {
        return;
    }
    let host = bivisor_kvm_backend::host();
    if !host.usable_for_process {
        return println!("SKIPPED: {}", host.reason);
    }
    let args = ["diff", "--all", "--kinds", "cpl0", "--engines", "interp,bt,kvm", "--cases", "60000", "--json"];
    let out = bivisor(&args);
    let said = text(&out.stderr).matches("SKIPPED: KVM is no engine of cpl0 here").count();
    assert_eq!(said, usize::from(!host.usable_for_machine), "{}", text(&out.stderr));
    let cases = |engine: &str| json(&out)["tally"]["counts"][engine]["cpl0"]["cases"].as_u64();
    assert_eq!(cases("kvm").is_some(), host.usable_for_machine);
    assert_eq!(cases("bt-paged"), Some(512), "sixteen of each of 32 batches");
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stdout));
}

/// Shards are parts of the whole, whatever the number of workers; a state file goes on where it was.
#[test]
fn shards_workers_and_resuming_give_the_same_results() {
    if !has_xsave() {
        return;
    }
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("shards");
    std::fs::create_dir_all(&dir).expect("a directory");
    let whole = json(&bivisor(&["diff", "--all", "--cases", "40000", "--seed", "5", "--jobs", "1", "--json"]));
    let mut files = Vec::new();
    for shard in ["0/3", "1/3", "2/3"] {
        let file = dir.join(format!("{}.json", &shard[..1]));
        let state = dir.join(format!("{}.state", &shard[..1]));
        let _ = std::fs::remove_file(&state);
        let state = state.to_str().expect("a plain path");
        let args = ["diff", "--all", "--cases", "40000", "--seed", "5", "--jobs", "2", "--shard", shard, "--json"];
        let args: Vec<&str> = args.into_iter().chain(["--state", state]).collect();
        let first = bivisor(&args);
        // Everything is done: nothing is done twice.
        assert_eq!(json(&bivisor(&args))["tally"]["cases"], json(&first)["tally"]["cases"]);
        std::fs::write(&file, &first.stdout).expect("writable");
        files.push(file.to_str().expect("a plain path").to_owned());
    }
    let mut args = vec!["diff", "merge", "--json"];
    args.extend(files.iter().map(String::as_str));
    let merged = json(&bivisor(&args));
    assert_eq!(merged["tally"]["cases"], whole["tally"]["cases"]);
    assert_eq!(merged["tally"]["counts"], whole["tally"]["counts"]);
    let twice = bivisor(&["diff", "merge", &files[0], &files[0]]);
    assert!(text(&twice.stderr).contains("given already"), "{}", text(&twice.stderr));
}

#[test]
fn wrong_use_is_told_in_a_line() {
    let rows: [(&[&str], &str); 5] = [
        (&["diff"], "nothing to do"),
        (&["diff", "--all", "--engines", "interp,qemu"], "no engine is called qemu"),
        (&["diff", "--all", "--kinds", "haiku"], "no kind of case is called haiku"),
        (&["diff", "--all", "--shard", "4/4"], "from 0 to 3"),
        (&["diff", "--all", "--engines", "interp"], "needs two"),
    ];
    for (args, what) in rows {
        let out = bivisor(args);
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        assert!(text(&out.stderr).contains(what), "{args:?}: {}", text(&out.stderr));
        assert_eq!(text(&out.stderr).lines().count(), 1, "{args:?}: {}", text(&out.stderr));
    }
}

fn scratch(name: &str) -> std::path::PathBuf {
    let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    dir
}

/// A program with a child and a signal, on both engines: every block compared, nothing differs, its output and its end are its own.
#[test]
fn a_program_in_lockstep() {
    let script = "trap 'echo got' USR1; kill -USR1 $$; echo $((6*7)) | cat; exit 3";
    let output = bivisor(&["diff", "--json", "/bin/sh", "-c", script]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(&lines[..2], ["got", "42"]);
    let r: serde_json::Value = serde_json::from_str(lines[2]).expect("JSON");
    assert_eq!((&r["ended"], &r["differences"]), (&"status 3".into(), &serde_json::json!([])));
    assert!(r["counts"]["instructions"].as_u64().is_some_and(|n| n > 100_000), "{r}");
    let output = bivisor(&["diff", "--grain", "insn", "/bin/true"]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains(" 0 differences"), "{text}");
    for bad in [&["diff", "--engines", "bt,kvm", "/bin/true"][..], &["diff", "--engines", "interp", "/bin/true"]] {
        assert_eq!(bivisor(bad).status.code(), Some(1), "{bad:?}");
    }
}

/// RDTSC differs from run to run, so a file with it is a repro: it is cut down to that instruction and shown.
#[test]
fn a_repro_is_played_back_and_cut_down() {
    let dir = scratch("replay");
    let file = |name: &str, code: &str| {
        let path = dir.join(name);
        let request = serde_json::json!({"memory": "flat", "cpl": 3, "regs": {"rip": "0x10001000", "rflags": "0x202", "rbx": "0x10002000"},
            "mem": [{"addr": "0x10001000", "hex": code, "rights": "rx"}, {"addr": "0x10002000", "fill": "00", "len": 16, "rights": "rw"}],
            "stop": {"insns": 4}, "want": ["regs", "segs", "fpu", "vec", "memdelta"]});
        std::fs::write(&path, request.to_string()).expect("written");
        path.to_string_lossy().into_owned()
    };
    // inc ecx; mov [rbx], ecx; rdtsc; nop
    let differs = file("clock.json", "ffc1890b0f3190");
    let output = bivisor(&["diff", "replay", "--json", &differs]);
    assert_eq!(output.status.code(), Some(1));
    let r: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let request = &r["request"];
    assert_eq!((&request["stop"]["insns"], &request["regs"]["rip"]), (&1.into(), &"0x10001004".into()));
    assert_eq!(request["note"]["text"], serde_json::json!(["0x10001004  rdtsc"]));
    assert_eq!(request["note"]["differs"][0]["what"], "regs.rax");
    let shown = bivisor(&["diff", "replay", &differs]);
    let text = String::from_utf8_lossy(&shown.stderr);
    assert!(text.contains("rdtsc") && text.contains("regs.rax") && !text.contains('\x1b'), "{text}");
    let same = file("same.json", "ffc1890b90909090");
    let output = bivisor(&["diff", "replay", &same]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::remove_dir_all(dir).expect("removed");
}

/// The program goes on with what it is given, and says nothing where nothing differs.
#[test]
fn a_sentinel_watches() {
    let script = "i=0; while [ $i -lt 100 ]; do i=$((i+1)); done; echo $i | cat";
    for every in ["1/1", "1/100"] {
        let output = bivisor(&["run", "--backend", "bt", "--sentinel", every, "/bin/sh", "-c", script]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*output.stdout, &*text), (Some(0), &b"100\n"[..], ""), "{every}");
    }
    assert_eq!(bivisor(&["run", "--sentinel", "0", "/bin/true"]).status.code(), Some(2));
    assert_eq!(bivisor(&["run", "--backend", "interp", "--sentinel", "1/2", "/bin/true"]).status.code(), Some(1));
}

/// What was found once stays mended: each request of testsuite/repros has one answer, in a process's memory and behind page tables.
#[test]
fn repros_stay_mended() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testsuite/repros");
    let dir = scratch("repros");
    let mut files: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(folder).expect("testsuite/repros") {
        let path = entry.expect("a file").path();
        let paged = dir.join(path.file_name().expect("a name"));
        let request = std::fs::read_to_string(&path).expect("readable");
        std::fs::write(&paged, request.replace("\"flat\"", "\"ram\"")).expect("written");
        files.extend([path, paged].map(|p| p.to_string_lossy().into_owned()));
    }
    assert!(files.len() >= 8, "{files:?}");
    let args: Vec<&str> = ["diff", "replay", "--json"].into_iter().chain(files.iter().map(String::as_str)).collect();
    let output = bivisor(&args);
    assert_eq!(output.status.code(), Some(0), "{}{}", text(&output.stdout), text(&output.stderr));
    for line in text(&output.stdout).lines() {
        let r: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert!(r["remark"].as_str().is_some_and(|w| w.starts_with("played back")), "{line}");
    }
    std::fs::remove_dir_all(dir).expect("removed");
}

/// What `--repro` writes of a sequence says how to see it again.
#[test]
fn a_sequence_is_not_played_back_but_drawn_again() {
    let dir = scratch("sequence");
    let file = dir.join("000-bt-paged-cpl0.json");
    let report =
        r#"{"engine":"bt-paged","code":"cpl0","seed":88,"batch":63,"repro":{"sequence":"Sequence { kernel: true }"}}"#;
    std::fs::write(&file, report).expect("written");
    let output = bivisor(&["diff", "replay", file.to_str().expect("text")]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("diff --all --kinds cpl0 --seed 88"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// A difference in 16- and 32-bit code is a request that `exec` carries out and `diff replay` plays back. Here the bug is planted in the
/// campaign's engine, so both do the same then, and it is what the judge did.
#[test]
fn differences_in_16_and_32_bit_code_are_played_back() {
    if !has_xsave() {
        return;
    }
    let dir = scratch("planted");
    let mut files = Vec::new();
    for (kind, mnemonic) in [
        (Kind::Insn16, Mnemonic::Adc),
        (Kind::Insn32, Mnemonic::Adc),
        (Kind::Insn16, Mnemonic::Push),
        (Kind::Insn32, Mnemonic::Lar),
        (Kind::Block16, Mnemonic::INVALID),
        (Kind::Block32, Mnemonic::INVALID),
    ] {
        let mut modes = Modes::new(&[Which::InterpPaged, Which::BtPaged], true).expect("engines");
        let wrong = move |case: &Case, cpu: &mut CpuState| {
            if !kind.is_single() || case.insn.mnemonic() == mnemonic {
                cpu.gpr[3] ^= 4;
            }
        };
        modes.engine(Which::BtPaged).expect("it is there").plant(Box::new(wrong));
        if kind.is_single() {
            modes.only(&Code::values().filter(|c| c.mnemonic() == mnemonic).collect::<Vec<_>>());
        }
        let good = |d: &&Divergence| d.part == "gpr" && d.repro["should"]["end"] == "Fault(Bp)";
        let found = (0..200).find_map(|n| {
            let mut tally = Tally::default();
            modes.batch(kind, 1, n, &mut tally);
            tally.divergences.iter().find(good).cloned()
        });
        let found = found.unwrap_or_else(|| panic!("{kind:?} {mnemonic:?}: not found"));
        let file = dir.join(format!("{}-{mnemonic:?}.json", kind.name()));
        std::fs::write(&file, serde_json::to_string(&found).expect("JSON")).expect("written");
        let request = dir.join("request");
        std::fs::write(&request, format!("{}\n", found.repro["request"])).expect("written");
        for backend in ["interp", "bt"] {
            let input = std::fs::File::open(&request).expect("there");
            let mut exec = Command::new(env!("CARGO_BIN_EXE_bivisor"));
            let out = exec.args(["exec", "--backend", backend]).stdin(input).output().expect("bivisor runs");
            let answer = json(&out);
            let number = |v: &serde_json::Value| u64::from_str_radix(&v.as_str().expect("a number")[2..], 16);
            for (n, name) in ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"].into_iter().enumerate() {
                let should = &found.repro["should"]["gpr"][n];
                assert_eq!(number(&answer["regs"][name]), number(should), "{backend} {name}: {answer}\n{}", found.text);
            }
        }
        files.push(file.to_string_lossy().into_owned());
    }
    let args: Vec<&str> = ["diff", "replay", "--json"].into_iter().chain(files.iter().map(String::as_str)).collect();
    let output = bivisor(&args);
    assert_eq!(output.status.code(), Some(0), "{}{}", text(&output.stdout), text(&output.stderr));
    assert_eq!(text(&output.stdout).matches("\"remark\":\"played back").count(), files.len());
    std::fs::remove_dir_all(dir).expect("removed");
}

/// Lines of an indented example in docs/fidelity.md, from the one that begins so on, without the indentation.
fn example(first: &str) -> Vec<String> {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/fidelity.md")).expect("the page");
    let lines = page.lines().skip_while(|l| l.trim_start() != first || !l.starts_with("    "));
    let lines: Vec<String> = lines.map_while(|l| l.strip_prefix("    ")).map(str::to_owned).collect();
    assert!(!lines.is_empty(), "no example begins with {first}");
    lines
}

/// Runs a shard's command line as a scheduler would: with the number in the environment, bivisor in the path.
fn shard(line: &str, variable: &str, n: u64, dir: &Path) {
    let program = Path::new(env!("CARGO_BIN_EXE_bivisor")).parent().expect("a directory");
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap_or_default());
    // Three shards of a few cases instead of sixteen of many.
    assert!(line.contains("/16 ") && line.contains("--cases 1000000000"), "{line}");
    let line = line.replace("/16 ", "/3 ").replace("--cases 1000000000", "--cases 12000 --jobs 1");
    let line = line.replace("/results", dir.to_str().expect("a plain path"));
    let out =
        Command::new("sh").args(["-c", &line]).env(variable, n.to_string()).env("PATH", path).current_dir(dir).output();
    let out = out.expect("sh");
    assert!(out.status.success(), "{line}: {}", text(&out.stderr));
}

/// The examples for Kubernetes and Slurm, as the page has them: their shards run here, and together they are the whole.
#[test]
fn the_schedulers_examples_run() {
    if !has_xsave() {
        return;
    }
    let job = example("apiVersion: batch/v1");
    let value = |key: &str| {
        let of = |l: &String| {
            Some(l.trim_start().trim_start_matches("- ").strip_prefix(key)?.strip_prefix(": ")?.to_owned())
        };
        job.iter().find_map(of).unwrap_or_else(|| panic!("the job has no {key}"))
    };
    assert_eq!((value("kind").as_str(), value("completionMode").as_str()), ("Job", "Indexed"));
    assert_eq!(value("completions"), "16");
    // Two spaces a level, a key or an item on each line.
    for line in &job {
        let item = line.trim_start().trim_start_matches("- ");
        assert!((line.len() - line.trim_start().len()) % 2 == 0 && item.contains(':'), "{line}");
    }
    let command = value("command");
    let command =
        command.strip_prefix("[sh, -c, \"").and_then(|c| c.strip_suffix("\"]")).expect("a shell's command line");
    let array = example("#SBATCH --array=0-15");
    let whole = bivisor(&["diff", "--all", "--cases", "12000", "--seed", "1", "--jobs", "1", "--json"]);
    for (name, line, variable) in
        [("kubernetes", command, "JOB_COMPLETION_INDEX"), ("slurm", array[1].as_str(), "SLURM_ARRAY_TASK_ID")]
    {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).expect("a directory");
        (0..3).for_each(|n| shard(line, variable, n, &dir));
        let files: Vec<String> = (0..3).map(|n| dir.join(format!("{n}.json")).display().to_string()).collect();
        let args: Vec<&str> = ["diff", "merge", "--json"].into_iter().chain(files.iter().map(String::as_str)).collect();
        assert_eq!(json(&bivisor(&args))["tally"]["counts"], json(&whole)["tally"]["counts"], "{name}");
    }
}

#[test]
fn sequences_agree() {
    let out = bivisor(&["diff", "--all", "--kinds", "cpl0,bytes,block", "--cases", "120000", "--seed", "3"]);
    println!("{}", text(&out.stdout));
    assert_eq!(out.status.code(), Some(0), "{}{}", text(&out.stdout), text(&out.stderr));
}

/// 32-bit code and 16-bit code of protected mode beside the host CPU in compatibility mode, in segments of all sorts.
#[test]
fn code_of_other_modes() {
    if !has_xsave() {
        return;
    }
    let args = ["diff", "--all", "--kinds", "insn32,insn16,block32,block16", "--cases", "100000", "--seed", "1"];
    let out = bivisor(&args);
    println!("{}{}", text(&out.stdout), text(&out.stderr));
    assert_eq!(out.status.code(), Some(0), "{}{}", text(&out.stdout), text(&out.stderr));
    assert!(text(&out.stdout).contains("interp-paged:16") && text(&out.stdout).contains("bt-paged:32"));
}
