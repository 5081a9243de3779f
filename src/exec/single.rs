//! One case from the command line: `--hex`, `--flat` or `--example` instead of JSON on standard input.
//!
//! The code lies at 0x10000, 64 KiB of zeroed memory at 0x20000; RSP is 0x28000 unless set. In `real16` CS is 0x1000 and SS, DS and ES
//! are 0x2000, so that the same places are meant.

use super::ExecArgs;
use anyhow::{Context, Result, bail};
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, al, byte_ptr, dx, eax, ebx, ecx, rax, rbx, rcx, rsp};
use serde_json::{Value, json};

const CODE: u64 = 0x10000;
const DATA: u64 = 0x20000;
const DATA_LEN: u64 = 0x10000;
const STACK: u64 = 0x28000;

/// A built-in example: its name, what it shows, and its code.
struct Example {
    name: &'static str,
    about: &'static str,
    assemble: fn(&mut CodeAssembler) -> Result<(), IcedError>,
}

const EXAMPLES: &[Example] = &[
    Example { name: "sum", about: "add the numbers from 1 to 100 into RAX", assemble: sum },
    Example {
        name: "popf",
        about: "POPF changes IF at CPL 0 and silently does not at CPL 3: try --cpl 3",
        assemble: popf,
    },
    Example { name: "port", about: "write \"Hi\" to port 0xe9", assemble: port },
    Example { name: "fault", about: "divide by zero", assemble: fault },
    Example { name: "sse", about: "square the double 3.0 into XMM0", assemble: sse },
];

fn sum(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.xor(eax, eax)?;
    a.mov(ecx, 100)?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.add(rax, rcx)?;
    a.dec(ecx)?;
    a.jne(again)?;
    a.int3()
}

fn popf(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.pushfq()?;
    a.pop(rax)?;
    a.mov(rbx, rax)?;
    a.xor(ebx, 0x200)?;
    a.push(rbx)?;
    a.popfq()?;
    a.pushfq()?;
    a.pop(rbx)?;
    a.int3()
}

fn port(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dx, 0xe9)?;
    a.mov(al, i32::from(b'H'))?;
    a.out(dx, al)?;
    a.mov(al, i32::from(b'i'))?;
    a.out(dx, al)?;
    a.int3()
}

fn fault(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.xor(ecx, ecx)?;
    a.div(ecx)?;
    a.int3()
}

fn sse(a: &mut CodeAssembler) -> Result<(), IcedError> {
    use iced_x86::code_asm::xmm0;
    a.mov(rax, 3.0f64.to_bits())?;
    a.mov(byte_ptr(rsp - 1), al)?;
    a.movq(xmm0, rax)?;
    a.mulsd(xmm0, xmm0)?;
    a.int3()
}

/// Does the command line hold a case?
pub fn given(args: &ExecArgs) -> bool {
    args.hex.is_some() || args.flat.is_some() || args.example.is_some()
}

/// The request that the command line describes.
pub fn request(args: &ExecArgs) -> Result<Value> {
    let bits = match args.mode.as_str() {
        "real16" | "prot16" | "compat16" => 16,
        "prot32" | "compat32" => 32,
        _ => 64,
    };
    let code = match (&args.hex, &args.flat, &args.example) {
        (Some(hex), None, None) => crate::decode::parse_hex(&hex.replace([' ', '_'], ""))?,
        (None, Some(path), None) => std::fs::read(path).with_context(|| path.display().to_string())?,
        (None, None, Some(name)) => example(name, bits)?,
        _ => bail!("give one of --hex, --flat, --example"),
    };
    let mut regs = json!({ "rip": CODE, "rsp": STACK });
    let mut segs = json!({});
    if args.mode == "real16" {
        regs = json!({ "rip": 0, "rsp": STACK - DATA });
        segs = json!({ "cs": CODE >> 4, "ss": DATA >> 4, "ds": DATA >> 4, "es": DATA >> 4 });
    }
    for set in &args.set {
        let (name, value) = set.split_once('=').with_context(|| format!("--set {set}: REGISTER=VALUE"))?;
        regs[name] = Value::String(value.to_owned());
    }
    let mut request = json!({
        "id": Value::Null, "mode": args.mode, "cpl": args.cpl, "regs": regs, "segs": segs,
        "mem": [{ "addr": DATA, "fill": "00", "len": DATA_LEN }, { "addr": CODE, "hex": hex(&code) }],
    });
    if let Some(n) = args.insns {
        request["stop"] = json!({ "insns": n });
    }
    Ok(request)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn example(name: &str, bits: u32) -> Result<Vec<u8>> {
    let found = EXAMPLES.iter().find(|e| e.name == name);
    let Some(e) = found else {
        let all: Vec<String> = EXAMPLES.iter().map(|e| format!("{} ({})", e.name, e.about)).collect();
        bail!("no example `{name}`: there are {}", all.join(", "));
    };
    if bits != 64 {
        bail!("the examples are 64-bit code: leave --mode out");
    }
    let mut a = CodeAssembler::new(64)?;
    (e.assemble)(&mut a)?;
    Ok(a.assemble(CODE)?)
}
