//! `bivisor exec` and `bivisor decode` from outside: the contract of requests and responses, bad input, throughput's correctness.

mod fed;

use fed::bivisor;
use serde_json::{Value, json};
use std::io::Write;
use std::process::{Command, Stdio};

fn exec_on(args: &[&str], requests: &[Value]) -> Vec<Value> {
    let input: String = requests.iter().map(|r| format!("{r}\n")).collect();
    let output = bivisor(&[&["exec"], args].concat(), &input);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("JSON is text");
    text.lines().map(|l| serde_json::from_str(l).expect("a JSON line")).collect()
}

/// On the interpreter; the translator must say the same.
fn exec(request: Value) -> Value {
    exec_all(&[request]).remove(0)
}

fn exec_all(requests: &[Value]) -> Vec<Value> {
    let interp = exec_on(&["--backend", "interp"], requests);
    assert_eq!(interp, exec_on(&["--backend", "bt"], requests), "interp and bt");
    interp
}

#[test]
fn registers_flags_and_hlt() {
    // add rax, rax; hlt
    let r = exec(json!({"id": "a", "regs": {"rax": "0x8000000000000000", "rip": "0x1000"},
        "mem": [{"addr": 0x1000, "hex": "4801c0f4"}]}));
    assert_eq!((&r["id"], &r["stop"], &r["insns"]), (&json!("a"), &json!("hlt"), &json!(2)));
    assert_eq!(r["regs"]["rax"], "0x0");
    assert_eq!(r["regs"]["rip"], "0x1004");
    // CF, PF, ZF, OF by the manual's definitions, and the fixed bit.
    assert_eq!(r["regs"]["rflags"], "0x847");
    assert_eq!(r["memdelta"], json!([]));
}

#[test]
fn one_instruction_and_memory_delta() {
    // mov [rbx], eax over a page end, at an address above RAM
    let r = exec(json!({"regs": {"rax": "0x11223344", "rbx": "0x7f0000000ffe", "rip": "0x400000"},
        "mem": [{"addr": "0x400000", "hex": "8903"}, {"addr": "0x7f0000000ff0", "fill": "aa", "len": 32}], "stop": {"insns": 1}}));
    assert_eq!((&r["stop"], &r["insns"]), (&json!("insns"), &json!(1)));
    assert_eq!(r["memdelta"], json!([{"addr": "0x7f0000000ffe", "hex": "44332211"}]));
}

#[test]
fn nothing_of_a_case_is_left_for_the_next() {
    let store = json!({"regs": {"rax": "0x77", "rip": "0x1000", "rbx": "0x2000"},
        "mem": [{"addr": "0x1000", "hex": "8803f4"}, {"addr": "0x2000", "hex": "00"}], "want": ["memdelta"]});
    let load = json!({"regs": {"rax": "0xff", "rip": "0x1000", "rbx": "0x2000"},
        "mem": [{"addr": "0x1000", "hex": "8a03f4"}, {"addr": "0x2001", "hex": "00"}], "want": ["regs", "memdelta"]});
    let r = exec_all(&[store.clone(), load, store]);
    assert_eq!(r[0]["memdelta"], json!([{"addr": "0x2000", "hex": "77"}]));
    assert_eq!(r[1]["regs"]["rax"], "0x0");
    assert_eq!(r[1]["memdelta"], json!([]));
    assert_eq!(r[2], r[0]);
}

#[test]
fn faults_are_told_and_the_state_is_that_before() {
    // mov rax, [rbx] from an unmapped page; div by zero; ud2; a privileged instruction at CPL 3
    let at = |hex: &str, cpl: u8| json!({"cpl": cpl, "regs": {"rbx": "0xdead000", "rip": "0x1000"}, "mem": [{"addr": "0x1000", "hex": hex}], "want": ["regs"]});
    let r = exec_all(&[at("488b03", 0), at("f7f1", 0), at("0f0b", 3), at("f4", 3), at("8b03", 3)]);
    let exception = |i: usize| r[i]["exception"].clone();
    assert_eq!(exception(0), json!({"vector": 14, "error": "0x0", "cr2": "0xdead000"}));
    assert_eq!(exception(1), json!({"vector": 0}));
    assert_eq!(exception(2), json!({"vector": 6}));
    assert_eq!(exception(3), json!({"vector": 13, "error": "0x0"}));
    assert_eq!(exception(4), json!({"vector": 14, "error": "0x4", "cr2": "0xdead000"}));
    for response in &r {
        assert_eq!(
            (&response["stop"], &response["insns"], &response["regs"]["rip"]),
            (&json!("exception"), &json!(0), &json!("0x1000"))
        );
    }
}

/// Rights of pages, behind page tables and in a process's memory.
#[test]
fn pages_have_rights() {
    // mov [rbx], eax to a read-only page, over the end of a page before one, and to one that is not there; a jump to data
    let at = |memory: &str, hex: &str, rbx: &str| {
        json!({"memory": memory, "cpl": 3, "regs": {"rbx": rbx, "rax": "0x11223344", "rip": "0x10001000", "rflags": "0x202"},
            "mem": [{"addr": "0x10001000", "hex": hex, "rights": "rx"}, {"addr": "0x10002000", "hex": "90", "rights": "rw"},
                {"addr": "0x10003000", "hex": "90", "rights": "r"}, {"addr": "0x10004000", "hex": "90", "rights": "none"}],
            "stop": {"insns": 2}, "want": ["regs", "memdelta"]})
    };
    let cases = |memory: &str| {
        [
            ("8903", "0x10003010"),
            ("8903", "0x10002ffe"),
            ("8b03", "0x10004000"),
            ("ffe390", "0x10002000"),
            ("890390", "0x10002010"),
        ]
        .map(|(hex, rbx)| at(memory, hex, rbx))
    };
    // Present, write, user, and fetch of the error code, by SDM 3A 4.7.
    let faults = [
        json!({"vector": 14, "error": "0x7", "cr2": "0x10003010"}),
        json!({"vector": 14, "error": "0x7", "cr2": "0x10003000"}),
        json!({"vector": 14, "error": "0x4", "cr2": "0x10004000"}),
        json!({"vector": 14, "error": "0x15", "cr2": "0x10002000"}),
        Value::Null,
    ];
    for memory in ["ram", "flat"] {
        let r = exec_all(&cases(memory));
        for (n, (r, fault)) in r.iter().zip(&faults).enumerate() {
            assert_eq!(&r["exception"], fault, "{memory} {n}: {r}");
        }
        assert_eq!(r[1]["memdelta"], json!([]), "{memory}: nothing of a store over a page end");
        assert_eq!(r[4]["memdelta"], json!([{"addr": "0x10002010", "hex": "44332211"}]), "{memory}");
    }
}

#[test]
fn flat_memory_is_where_the_process_has_room() {
    let r = exec_on(
        &["--backend", "bt"],
        &[
            json!({"memory": "flat", "cpl": 3, "regs": {"rip": "0x7ffffffff000"}, "mem": [{"addr": "0x7ffffffff000", "hex": "90"}], "stop": {"insns": 1}}),
            // A system call is nobody's; five instructions in one block, a branch out of its middle among them.
            json!({"memory": "flat", "cpl": 3, "regs": {"rip": "0x10001000", "rflags": "0x202"},
                "mem": [{"addr": "0x10001000", "hex": "0f05", "rights": "rx"}], "want": ["regs"]}),
            json!({"memory": "flat", "cpl": 3, "regs": {"rip": "0x10001000", "rflags": "0x202", "rcx": 1},
                "mem": [{"addr": "0x10001000", "hex": "ffc0e305ffc1e301f4ffc2e3f9ffc0", "rights": "rx"}],
                "stop": {"insns": 5}, "want": ["regs"], "note": {"any": "thing"}}),
        ],
    );
    assert_eq!(
        (&r[0]["stop"], r[0]["reason"].as_str().map(|s| s.contains("0x7ffffffff000"))),
        (&json!("unsupported"), Some(true))
    );
    assert_eq!(r[1]["stop"], "unsupported");
    assert_eq!((&r[2]["stop"], &r[2]["insns"]), (&json!("exception"), &json!(4)), "{}", r[2]);
    assert_eq!((&r[2]["exception"]["vector"], &r[2]["regs"]["rip"]), (&json!(13), &json!("0x10001008")));
    assert_eq!(
        (&r[2]["regs"]["rax"], &r[2]["regs"]["rcx"], &r[2]["regs"]["rdx"]),
        (&json!("0x1"), &json!("0x2"), &json!("0x0"))
    );
}

#[test]
fn unmapped_ram_appears_when_touched() {
    let r = exec(json!({"unmapped": "ram", "ram_fill": "5a", "regs": {"rbx": "0x123456789000", "rip": "0x1000"},
        "mem": [{"addr": "0x1000", "hex": "488b03f4"}], "want": ["regs"]}));
    assert_eq!((&r["stop"], &r["regs"]["rax"]), (&json!("hlt"), &json!("0x5a5a5a5a5a5a5a5a")));
}

#[test]
fn ports_are_noted() {
    // in al, 0x60; out 0x80, al; hlt
    let r = exec(
        json!({"io_in": "a5", "regs": {"rip": "0x1000"}, "mem": [{"addr": "0x1000", "hex": "e460e680f4"}], "want": ["io"]}),
    );
    assert_eq!(
        r["io"],
        json!([{"dir": "in", "port": 0x60, "size": 1, "val": "0xa5"}, {"dir": "out", "port": 0x80, "size": 1, "val": "0xa5"}])
    );
}

#[test]
fn stops() {
    let endless = |extra: Value| {
        let mut r =
            json!({"regs": {"rip": "0x1000"}, "mem": [{"addr": "0x1000", "hex": "ffc0ebfc"}], "want": ["regs"]});
        r.as_object_mut().expect("object").extend(extra.as_object().expect("object").clone());
        r
    };
    let r = exec_on(
        &[],
        &[
            endless(json!({"max_insns": 1000})),
            endless(json!({"stop": {"rip": "0x1002"}})),
            endless(json!({"stop": {"insns": 7}})),
        ],
    );
    assert_eq!((&r[0]["stop"], &r[0]["insns"], &r[0]["regs"]["rax"]), (&json!("limit"), &json!(1000), &json!("0x1f4")));
    assert_eq!((&r[1]["stop"], &r[1]["insns"], &r[1]["regs"]["rip"]), (&json!("rip"), &json!(1), &json!("0x1002")));
    assert_eq!((&r[2]["stop"], &r[2]["insns"], &r[2]["regs"]["rax"]), (&json!("insns"), &json!(7), &json!("0x4")));
}

#[test]
fn vectors_and_x87() {
    // addpd xmm0, xmm1; fld1; hlt
    let r = exec(
        json!({"regs": {"rip": "0x1000"}, "vec": {"xmm0": "0x3ff00000000000004000000000000000", "xmm1": "0x3ff00000000000003ff0000000000000"},
        "mem": [{"addr": "0x1000", "hex": "660f58c1d9e8f4"}], "want": ["vec", "fpu"]}),
    );
    let vec = r["vec"].as_object().expect("vectors");
    let low = vec.iter().find(|(k, _)| k.ends_with("mm0")).expect("register 0").1.as_str().expect("text");
    assert!(low.ends_with("40000000000000004008000000000000"), "{low}");
    assert_eq!(r["fpu"]["st"][0], "0x3fff8000000000000000");
    assert_eq!(r["fpu"]["ftw_abridged"], "0x80");
}

#[test]
fn exceptions_delivered_through_the_real_mode_table() {
    // INT 0x21 and a divide error in real mode, handler HLT
    let r = exec(
        json!({"mode": "real16", "deliver": true, "ram_fill": "f4", "regs": {"rip": 0, "rsp": "0x1000", "rcx": 0},
        "segs": {"cs": 0x100, "ss": 0x200}, "mem": [{"addr": 0x1000, "hex": "f7f1"}, {"addr": 0, "hex": "00000003"}], "want": ["regs", "segs", "memdelta"]}),
    );
    assert_eq!((&r["stop"], &r["exception"]["vector"]), (&json!("hlt"), &json!(0)));
    assert_eq!(
        (&r["segs"]["cs"]["sel"], &r["regs"]["rip"], &r["regs"]["rsp"]),
        (&json!("0x300"), &json!("0x1"), &json!("0xffa"))
    );
    // IP, CS, FLAGS of the faulting instruction.
    assert_eq!(r["memdelta"], json!([{"addr": "0x2ffa", "hex": "000000010200"}]));
}

#[test]
fn results_come_in_order_from_several_threads() {
    let requests: Vec<Value> = (0..2000)
        .map(|i| json!({"id": i, "regs": {"rax": i, "rip": "0x1000"}, "mem": [{"addr": "0x1000", "hex": "ffc0"}], "stop": {"insns": 1}, "want": ["regs"]}))
        .collect();
    for jobs in ["1", "3"] {
        for (i, r) in exec_on(&["--jobs", jobs], &requests).iter().enumerate() {
            assert_eq!((&r["id"], &r["regs"]["rax"]), (&json!(i), &json!(format!("{:#x}", i + 1))));
        }
    }
}

#[test]
fn malformed_input_is_a_usage_error_and_earlier_results_are_kept() {
    let good = r#"{"id":1,"regs":{"rip":"0x1000"},"mem":[{"addr":"0x1000","hex":"f4"}],"want":["regs"]}"#;
    let bad = [
        "{",
        r#"{"mode":"long65"}"#,
        r#"{"regs":{"rzx":1}}"#,
        r#"{"mem":[{"addr":0}]}"#,
        r#"{"mem":[{"addr":0,"hex":"0"}]}"#,
        r#"{"nonsense":1}"#,
        r#"{"memory":"flat"}"#,
        r#"{"mem":[{"addr":0,"hex":"00","rights":"w"}]}"#,
        r#"{"mode":"prot32","mem":[{"addr":0,"hex":"00","rights":"r"}]}"#,
        r#"{"cpl":4}"#,
        r#"{"want":["everything"]}"#,
        r#"{"mem":[{"addr":"0x8000000000000000","hex":"00"}]}"#,
        r#"{"mode":"prot32","mem":[{"addr":"0xffffffffffff","hex":"00"}]}"#,
    ];
    for line in bad {
        let output = bivisor(&["exec"], &format!("{good}\n{line}\n{good}\n"));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{line}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{line}: {stderr}");
        assert!(stderr.starts_with("bivisor: line 2: "), "{line}: {stderr}");
        assert_eq!(output.stdout.iter().filter(|b| **b == b'\n').count(), 1, "{line}");
    }
}

#[test]
fn the_schema_is_json_and_names_every_field_of_a_response() {
    let output = bivisor(&["exec", "--schema"], "");
    let schema: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let properties = schema["$defs"]["response"]["properties"].as_object().expect("properties");
    let all = json!(["regs", "segs", "sys", "fpu", "vec", "memdelta", "io"]);
    let r = exec(json!({"regs": {"rip": "0x1000"}, "mem": [{"addr": "0x1000", "hex": "f4"}], "want": all}));
    for name in r.as_object().expect("object").keys() {
        assert!(properties.contains_key(name), "{name}");
    }
    for name in all.as_array().expect("array") {
        assert!(r.get(name.as_str().expect("text")).is_some(), "{name}");
    }
}

#[test]
fn one_case_from_the_command_line() {
    let run = |args: &[&str]| -> Value {
        let output = bivisor(&[&["exec"], args].concat(), "");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    for backend in ["interp", "bt"] {
        let r = run(&["--backend", backend, "--hex", "48 01 c0 f4", "--set", "rax=0x21"]);
        assert_eq!((&r["stop"], &r["regs"]["rax"]), (&json!("hlt"), &json!("0x42")));
        let r = run(&["--backend", backend, "--example", "sum"]);
        assert_eq!((&r["exception"]["vector"], &r["regs"]["rax"]), (&json!(3), &json!("0x13ba")));
        let r = run(&["--backend", backend, "--example", "popf"]);
        assert_eq!((&r["regs"]["rax"], &r["regs"]["rbx"]), (&json!("0x2"), &json!("0x202")), "CPL 0 changes IF");
        let r = run(&["--backend", backend, "--example", "popf", "--cpl", "3"]);
        assert_eq!((&r["regs"]["rax"], &r["regs"]["rbx"]), (&json!("0x2"), &json!("0x2")), "CPL 3 does not");
        let r = run(&["--backend", backend, "--hex", "b80100b90200", "--mode", "real16", "--insns", "2"]);
        assert_eq!((&r["insns"], &r["regs"]["rcx"], &r["regs"]["rip"]), (&json!(2), &json!("0x2"), &json!("0x6")));
    }
    for bad in
        [&["--hex", "4"][..], &["--example", "none"], &["--flat", "/nonexistent"], &["--hex", "f4", "--set", "rax"]]
    {
        assert_eq!(bivisor(&[&["exec"], bad].concat(), "").status.code(), Some(1), "{bad:?}");
    }
    assert_eq!(bivisor(&["exec", "--hex", "f4", "--set", "rzx=1"], "").status.code(), Some(2));
}

/// A driver that sends a case and waits for its answer before it sends the next gets it.
#[test]
fn an_answer_does_not_wait_for_more_input() {
    use std::io::{BufRead, BufReader};
    let mut child = Command::new(env!("CARGO_BIN_EXE_bivisor"))
        .args(["exec", "--jobs", "2"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("bivisor starts");
    let mut stdin = child.stdin.take().expect("piped");
    let mut answers = BufReader::new(child.stdout.take().expect("piped")).lines();
    for i in 0..3 {
        let request =
            json!({"id": i, "regs": {"rip": "0x1000"}, "mem": [{"addr": "0x1000", "hex": "f4"}], "want": ["regs"]});
        writeln!(stdin, "{request}").expect("written");
        let answer: Value = serde_json::from_str(&answers.next().expect("an answer").expect("text")).expect("JSON");
        assert_eq!(answer["id"], i);
    }
    drop(stdin);
    assert!(child.wait().expect("ends").success());
}

#[test]
fn decode_tells_length_and_validity() {
    let cases = [
        ("64", "0fa2", 2, true),
        ("64", "48b8112233445566778890", 10, true),
        ("64", "06", 0, false), // PUSH ES
        ("32", "06", 1, true),
        ("16", "66b811223344", 6, true),
        ("64", "f00fb103", 4, true), // LOCK CMPXCHG
        ("64", "f08903", 0, false),  // LOCK MOV
        ("64", "0f", 0, false),
        ("64", "6666666666666666666666666666666690", 0, false), // 17 bytes
    ];
    for (mode, hex, len, valid) in cases {
        let output = bivisor(&["decode", "--mode", mode], &format!("{hex}\n"));
        let r: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!((&r["hex"], &r["len"], &r["valid"]), (&json!(hex), &json!(len), &json!(valid)), "{mode} {hex}");
    }
    assert_eq!(bivisor(&["decode"], "zz\n").status.code(), Some(2));
    assert_eq!(bivisor(&["decode", "--mode", "48"], "").status.code(), Some(2));
}
