//! `interp/alu.rs` against the host CPU: all byte operands, all carries; edges and random values above. Flags that the
//! manual leaves undefined are compared like the others.

use bivisor_emulator::cpu::Rflags;
use bivisor_emulator::interp::alu;
use bivisor_emulator::isa::Width;
use bivisor_testsuite::host::{Host, Regs};
use bivisor_testsuite::random::Random;

/// RAX, RCX, RDX.
type Values = [u64; 3];
type Model = fn(Width, Values, Rflags) -> Option<(Values, Rflags)>;

/// How the instruction's bytes depend on the width. ModRM is for operands RAX, RCX (RDX).
enum Code {
    /// Opcode with the width bit in bit 0; 66 and REX.W as needed.
    Legacy(&'static [u8]),
    /// Two-byte opcode without a byte form, with a mandatory prefix if not 0.
    Wide(u8, &'static [u8]),
    /// VEX.LZ.0F38: pp, vvvv register, opcode, ModRM. 32 and 64 bits.
    Vex { pp: u8, vvvv: u8, opcode: u8, modrm: u8 },
    /// No operands, byte width, 32-bit code only.
    Only32(&'static [u8]),
}

use Code::{Legacy, Only32, Vex, Wide};

impl Code {
    fn widths(&self) -> &'static [Width] {
        match self {
            Legacy(_) => &Width::ALL,
            Wide(..) => &Width::ALL[1..],
            Vex { .. } => &Width::ALL[2..],
            Only32(_) => &Width::ALL[..1],
        }
    }

    fn bytes(&self, w: Width) -> Vec<u8> {
        let mut out = Vec::new();
        if w == Width::W {
            out.push(0x66);
        }
        match *self {
            Legacy(code) => {
                if w == Width::Q {
                    out.push(0x48);
                }
                out.extend(code);
                if w != Width::B {
                    let opcode = out.len() - code.len();
                    out[opcode] |= 1;
                }
            }
            Wide(prefix, code) => {
                out.extend((prefix != 0).then_some(prefix));
                if w == Width::Q {
                    out.push(0x48);
                }
                out.extend(code);
            }
            Vex { pp, vvvv, opcode, modrm } => {
                let rex_w = if w == Width::Q { 0x80 } else { 0 };
                out.extend([0xc4, 0xe2, rex_w | (!vvvv & 15) << 3 | pp, opcode, modrm]);
            }
            Only32(code) => out.extend(code),
        }
        out
    }
}

/// The register rule: 8 and 16 bits keep the rest, 32 bits clear it.
fn put(w: Width, old: u64, v: u64) -> u64 {
    match w {
        Width::B | Width::W => (old & !w.mask()) | v,
        Width::D | Width::Q => v,
    }
}

/// Result to RAX.
fn rax(w: Width, x: Values, (r, f): (u64, Rflags)) -> Option<(Values, Rflags)> {
    Some(([put(w, x[0], r), x[1], x[2]], f))
}

fn product(w: Width, x: Values, (low, high, f): (u64, u64, Rflags)) -> Option<(Values, Rflags)> {
    Some(match w {
        Width::B => ([put(Width::W, x[0], high << 8 | low), x[1], x[2]], f),
        _ => ([put(w, x[0], low), x[1], put(w, x[2], high)], f),
    })
}

fn quotient(w: Width, x: Values, out: Option<(u64, u64, Rflags)>) -> Option<(Values, Rflags)> {
    let (q, r, f) = out?;
    product(w, x, (q, r, f))
}

/// The dividend's high and low half.
fn dividend(w: Width, x: Values) -> (u64, u64) {
    match w {
        Width::B => (x[0] >> 8 & 0xff, x[0] & 0xff),
        _ => (w.cut(x[2]), w.cut(x[0])),
    }
}

fn cf(f: Rflags) -> bool {
    f.contains(Rflags::CF)
}

fn by_immediate(f: fn(Width, u64, u64, Rflags) -> alu::Out, w: Width, x: Values, count: u64, old: Rflags) -> alu::Out {
    alu::by_immediate(w, count, old, f(w, w.cut(x[0]), count, old))
}

#[rustfmt::skip]
const CHECKS: &[(&str, Code, Model)] = &[
    ("add", Legacy(&[0x00, 0xc8]), |w, x, _| rax(w, x, alu::add(w, w.cut(x[0]), w.cut(x[1]), false))),
    ("adc", Legacy(&[0x10, 0xc8]), |w, x, f| rax(w, x, alu::add(w, w.cut(x[0]), w.cut(x[1]), cf(f)))),
    ("sub", Legacy(&[0x28, 0xc8]), |w, x, _| rax(w, x, alu::sub(w, w.cut(x[0]), w.cut(x[1]), false))),
    ("sbb", Legacy(&[0x18, 0xc8]), |w, x, f| rax(w, x, alu::sub(w, w.cut(x[0]), w.cut(x[1]), cf(f)))),
    ("cmp", Legacy(&[0x38, 0xc8]), |w, x, _| Some((x, alu::sub(w, w.cut(x[0]), w.cut(x[1]), false).1))),
    ("and", Legacy(&[0x20, 0xc8]), |w, x, _| rax(w, x, alu::and(w, w.cut(x[0]), w.cut(x[1])))),
    ("or", Legacy(&[0x08, 0xc8]), |w, x, _| rax(w, x, alu::or(w, w.cut(x[0]), w.cut(x[1])))),
    ("xor", Legacy(&[0x30, 0xc8]), |w, x, _| rax(w, x, alu::xor(w, w.cut(x[0]), w.cut(x[1])))),
    ("test", Legacy(&[0x84, 0xc8]), |w, x, _| Some((x, alu::and(w, w.cut(x[0]), w.cut(x[1])).1))),
    ("inc", Legacy(&[0xfe, 0xc0]), |w, x, f| rax(w, x, alu::inc(w, w.cut(x[0]), f))),
    ("dec", Legacy(&[0xfe, 0xc8]), |w, x, f| rax(w, x, alu::dec(w, w.cut(x[0]), f))),
    ("neg", Legacy(&[0xf6, 0xd8]), |w, x, _| rax(w, x, alu::neg(w, w.cut(x[0])))),
    ("shl", Legacy(&[0xd2, 0xe0]), |w, x, f| rax(w, x, alu::shl(w, w.cut(x[0]), x[1] & 0xff, f))),
    ("sal /6", Legacy(&[0xd2, 0xf0]), |w, x, f| rax(w, x, alu::shl(w, w.cut(x[0]), x[1] & 0xff, f))),
    ("shr", Legacy(&[0xd2, 0xe8]), |w, x, f| rax(w, x, alu::shr(w, w.cut(x[0]), x[1] & 0xff, f))),
    ("sar", Legacy(&[0xd2, 0xf8]), |w, x, f| rax(w, x, alu::sar(w, w.cut(x[0]), x[1] & 0xff, f))),
    ("rol", Legacy(&[0xd2, 0xc0]), |w, x, f| rax(w, x, alu::rol(w, w.cut(x[0]), x[1] & 0xff, f))),
    ("ror", Legacy(&[0xd2, 0xc8]), |w, x, f| rax(w, x, alu::ror(w, w.cut(x[0]), x[1] & 0xff, f))),
    ("rcl", Legacy(&[0xd2, 0xd0]), |w, x, f| rax(w, x, alu::rcl(w, w.cut(x[0]), x[1] & 0xff, f))),
    ("rcr", Legacy(&[0xd2, 0xd8]), |w, x, f| rax(w, x, alu::rcr(w, w.cut(x[0]), x[1] & 0xff, f))),
    ("rol by 1", Legacy(&[0xd0, 0xc0]), |w, x, f| rax(w, x, by_immediate(alu::rol, w, x, 1, f))),
    ("rol by 33", Legacy(&[0xc0, 0xc0, 33]), |w, x, f| rax(w, x, by_immediate(alu::rol, w, x, 33, f))),
    ("rol by 8", Legacy(&[0xc0, 0xc0, 8]), |w, x, f| rax(w, x, by_immediate(alu::rol, w, x, 8, f))),
    ("rol by 64", Legacy(&[0xc0, 0xc0, 64]), |w, x, f| rax(w, x, by_immediate(alu::rol, w, x, 64, f))),
    ("ror by 1", Legacy(&[0xd0, 0xc8]), |w, x, f| rax(w, x, by_immediate(alu::ror, w, x, 1, f))),
    ("ror by 33", Legacy(&[0xc0, 0xc8, 33]), |w, x, f| rax(w, x, by_immediate(alu::ror, w, x, 33, f))),
    ("ror by 19", Legacy(&[0xc0, 0xc8, 19]), |w, x, f| rax(w, x, by_immediate(alu::ror, w, x, 19, f))),
    ("ror by 32", Legacy(&[0xc0, 0xc8, 32]), |w, x, f| rax(w, x, by_immediate(alu::ror, w, x, 32, f))),
    ("shl by 2", Legacy(&[0xc0, 0xe0, 2]), |w, x, f| rax(w, x, alu::shl(w, w.cut(x[0]), 2, f))),
    ("shr by 9", Legacy(&[0xc0, 0xe8, 9]), |w, x, f| rax(w, x, alu::shr(w, w.cut(x[0]), 9, f))),
    ("sar by 7", Legacy(&[0xc0, 0xf8, 7]), |w, x, f| rax(w, x, alu::sar(w, w.cut(x[0]), 7, f))),
    ("rcl by 2", Legacy(&[0xc0, 0xd0, 2]), |w, x, f| rax(w, x, alu::rcl(w, w.cut(x[0]), 2, f))),
    ("rcr by 9", Legacy(&[0xc0, 0xd8, 9]), |w, x, f| rax(w, x, alu::rcr(w, w.cut(x[0]), 9, f))),
    ("shld by 3", Wide(0, &[0x0f, 0xa4, 0xd0, 3]), |w, x, f| rax(w, x, alu::shld(w, w.cut(x[0]), w.cut(x[2]), 3, f))),
    ("shrd by 25", Wide(0, &[0x0f, 0xac, 0xd0, 25]), |w, x, f| rax(w, x, alu::shrd(w, w.cut(x[0]), w.cut(x[2]), 25, f))),
    ("shld", Wide(0, &[0x0f, 0xa5, 0xd0]), |w, x, f| rax(w, x, alu::shld(w, w.cut(x[0]), w.cut(x[2]), x[1] & 0xff, f))),
    ("shrd", Wide(0, &[0x0f, 0xad, 0xd0]), |w, x, f| rax(w, x, alu::shrd(w, w.cut(x[0]), w.cut(x[2]), x[1] & 0xff, f))),
    ("mul", Legacy(&[0xf6, 0xe1]), |w, x, f| product(w, x, alu::mul(w, w.cut(x[0]), w.cut(x[1]), f))),
    ("imul", Legacy(&[0xf6, 0xe9]), |w, x, f| product(w, x, alu::imul(w, w.cut(x[0]), w.cut(x[1]), f))),
    ("imul two operands", Wide(0, &[0x0f, 0xaf, 0xc1]), |w, x, f| {
        let (r, _, f) = alu::imul(w, w.cut(x[0]), w.cut(x[1]), f);
        rax(w, x, (r, f))
    }),
    ("div", Legacy(&[0xf6, 0xf1]), |w, x, f| {
        let (high, low) = dividend(w, x);
        quotient(w, x, alu::div(w, high, low, w.cut(x[1]), f))
    }),
    ("idiv", Legacy(&[0xf6, 0xf9]), |w, x, f| {
        let (high, low) = dividend(w, x);
        quotient(w, x, alu::idiv(w, high, low, w.cut(x[1]), f))
    }),
    ("bt", Wide(0, &[0x0f, 0xa3, 0xc8]), |w, x, f| Some((x, alu::bt(w, w.cut(x[0]), x[1], f)))),
    ("bts", Wide(0, &[0x0f, 0xab, 0xc8]), |w, x, f| rax(w, x, (w.cut(x[0]) | alu::bit_mask(w, x[1]), alu::bt(w, w.cut(x[0]), x[1], f)))),
    ("btr", Wide(0, &[0x0f, 0xb3, 0xc8]), |w, x, f| rax(w, x, (w.cut(x[0]) & !alu::bit_mask(w, x[1]), alu::bt(w, w.cut(x[0]), x[1], f)))),
    ("btc", Wide(0, &[0x0f, 0xbb, 0xc8]), |w, x, f| rax(w, x, (w.cut(x[0]) ^ alu::bit_mask(w, x[1]), alu::bt(w, w.cut(x[0]), x[1], f)))),
    ("bsf", Wide(0, &[0x0f, 0xbc, 0xc1]), |w, x, _| match alu::bsf(w, w.cut(x[1])) {
        (Some(r), f) => rax(w, x, (r, f)),
        (None, f) => Some((x, f)),
    }),
    ("bsr", Wide(0, &[0x0f, 0xbd, 0xc1]), |w, x, _| match alu::bsr(w, w.cut(x[1])) {
        (Some(r), f) => rax(w, x, (r, f)),
        (None, f) => Some((x, f)),
    }),
    ("tzcnt", Wide(0xf3, &[0x0f, 0xbc, 0xc1]), |w, x, f| rax(w, x, alu::tzcnt(w, w.cut(x[1]), f))),
    ("lzcnt", Wide(0xf3, &[0x0f, 0xbd, 0xc1]), |w, x, f| rax(w, x, alu::lzcnt(w, w.cut(x[1]), f))),
    ("popcnt", Wide(0xf3, &[0x0f, 0xb8, 0xc1]), |w, x, _| rax(w, x, alu::popcnt(w.cut(x[1])))),
    ("andn", Vex { pp: 0, vvvv: 1, opcode: 0xf2, modrm: 0xc2 }, |w, x, _| rax(w, x, alu::andn(w, w.cut(x[1]), w.cut(x[2])))),
    ("bextr", Vex { pp: 0, vvvv: 2, opcode: 0xf7, modrm: 0xc1 }, |w, x, _| rax(w, x, alu::bextr(w, w.cut(x[1]), w.cut(x[2])))),
    ("blsr", Vex { pp: 0, vvvv: 0, opcode: 0xf3, modrm: 0xc9 }, |w, x, _| rax(w, x, alu::blsr(w, w.cut(x[1])))),
    ("blsmsk", Vex { pp: 0, vvvv: 0, opcode: 0xf3, modrm: 0xd1 }, |w, x, _| rax(w, x, alu::blsmsk(w, w.cut(x[1])))),
    ("blsi", Vex { pp: 0, vvvv: 0, opcode: 0xf3, modrm: 0xd9 }, |w, x, _| rax(w, x, alu::blsi(w, w.cut(x[1])))),
    ("bzhi", Vex { pp: 0, vvvv: 2, opcode: 0xf5, modrm: 0xc1 }, |w, x, _| rax(w, x, alu::bzhi(w, w.cut(x[1]), w.cut(x[2])))),
    ("pdep", Vex { pp: 3, vvvv: 1, opcode: 0xf5, modrm: 0xc2 }, |w, x, f| rax(w, x, (alu::pdep(w.cut(x[1]), w.cut(x[2])), f))),
    ("pext", Vex { pp: 2, vvvv: 1, opcode: 0xf5, modrm: 0xc2 }, |w, x, f| rax(w, x, (alu::pext(w.cut(x[1]), w.cut(x[2])), f))),
    ("sarx", Vex { pp: 2, vvvv: 2, opcode: 0xf7, modrm: 0xc1 }, |w, x, f| rax(w, x, (alu::sarx(w, w.cut(x[1]), x[2]), f))),
    ("shlx", Vex { pp: 1, vvvv: 2, opcode: 0xf7, modrm: 0xc1 }, |w, x, f| rax(w, x, (alu::shlx(w, w.cut(x[1]), x[2]), f))),
    ("shrx", Vex { pp: 3, vvvv: 2, opcode: 0xf7, modrm: 0xc1 }, |w, x, f| rax(w, x, (alu::shrx(w, w.cut(x[1]), x[2]), f))),
    ("adcx", Wide(0x66, &[0x0f, 0x38, 0xf6, 0xc1]), |w, x, f| rax(w, x, alu::adcx(w, w.cut(x[0]), w.cut(x[1]), f))),
    ("adox", Wide(0xf3, &[0x0f, 0x38, 0xf6, 0xc1]), |w, x, f| rax(w, x, alu::adox(w, w.cut(x[0]), w.cut(x[1]), f))),
    ("crc32 r32", Wide(0xf2, &[0x0f, 0x38, 0xf1, 0xc1]), |w, x, f| Some(([alu::crc32(w, x[0], w.cut(x[1])), x[1], x[2]], f))),
    ("daa", Only32(&[0x27]), |w, x, f| rax(w, x, alu::daa(x[0] & 0xff, f))),
    ("das", Only32(&[0x2f]), |w, x, f| rax(w, x, alu::das(x[0] & 0xff, f))),
    ("aaa", Only32(&[0x37]), |_, x, f| rax(Width::W, x, alu::aaa(x[0] & 0xffff, f))),
    ("aas", Only32(&[0x3f]), |_, x, f| rax(Width::W, x, alu::aas(x[0] & 0xffff, f))),
    ("aam", Only32(&[0xd4, 10]), |_, x, _| rax(Width::W, x, alu::aam(x[0] & 0xff, 10)?)),
    ("aam 0", Only32(&[0xd4, 0]), |_, x, _| rax(Width::W, x, alu::aam(x[0] & 0xff, 0)?)),
    ("aad", Only32(&[0xd5, 10]), |_, x, _| rax(Width::W, x, alu::aad(x[0] & 0xffff, 10))),
    ("aad 255", Only32(&[0xd5, 255]), |_, x, _| rax(Width::W, x, alu::aad(x[0] & 0xffff, 255))),
];

/// ADCX and ADOX have no 16-bit form: 66 is a mandatory prefix there.
fn has_width(name: &str, w: Width) -> bool {
    !(matches!(name, "adcx" | "adox") && w == Width::W)
}

/// Runs one input on both; says what differs.
fn compare(host: &mut Host, model: Model, w: Width, values: Values, old: Rflags) -> Result<(), String> {
    let mut regs = Regs { rflags: old.bits() | 0x202, ..Regs::default() };
    regs.gpr[..3].copy_from_slice(&values);
    let (fault, r) = host.run(&regs);
    let real = fault.is_none().then_some(([r.gpr[0], r.gpr[1], r.gpr[2]], r.rflags & STATUS));
    let ours = model(w, values, old).map(|(v, f)| (v, f.bits()));
    if real == ours {
        return Ok(());
    }
    Err(format!("{w:?} rax,rcx,rdx={values:x?} flags={:x}: CPU {real:x?}, model {ours:x?}", old.bits()))
}

/// All of them.
const STATUS: u64 = Rflags::STATUS.bits();
const OLD: [u64; 4] = [0, 1, 0x8d5, 0x8d4];

fn host_has(name: &str) -> bool {
    match name {
        "andn" | "bextr" | "blsr" | "blsmsk" | "blsi" => is_x86_feature_detected!("bmi1"),
        "bzhi" | "pdep" | "pext" | "sarx" | "shlx" | "shrx" => is_x86_feature_detected!("bmi2"),
        "adcx" | "adox" => is_x86_feature_detected!("adx"),
        "crc32 r32" => is_x86_feature_detected!("sse4.2"),
        "tzcnt" => is_x86_feature_detected!("bmi1"),
        "lzcnt" => is_x86_feature_detected!("lzcnt"),
        "popcnt" => is_x86_feature_detected!("popcnt"),
        _ => true,
    }
}

#[test]
fn every_byte_operation_on_every_operand() {
    let mut wrong = Vec::new();
    let mut count = 0u64;
    for (name, code, model) in CHECKS.iter().filter(|c| c.1.widths().contains(&Width::B)) {
        let bitness = if matches!(code, Only32(_)) { 32 } else { 64 };
        let Some(mut host) = Host::new(bitness) else {
            eprintln!("SKIPPED {name}: this host runs no {bitness}-bit code");
            continue;
        };
        let bytes = code.bytes(Width::B);
        host.load(&bytes);
        let mut found = None;
        // DIV faults often and a fault costs a signal: all quotients by a few divisors instead.
        let division = name.ends_with("div");
        for a in 0..=0xffffu64 {
            for old in OLD {
                let (x, y) = if division {
                    (a, (a ^ a >> 8).wrapping_mul(37) >> 1 & 0xff)
                } else {
                    (a & 0xff | 0xa5a5_0000, a >> 8)
                };
                // BCD adjusts look at AH, AL and AF.
                let (x, y) = if bitness == 32 { (a, 0) } else { (x, y) };
                count += 1;
                if let Err(e) = compare(&mut host, *model, Width::B, [x, y, 0x77], Rflags::from_bits_retain(old)) {
                    found.get_or_insert(e);
                }
            }
        }
        wrong.extend(found.map(|e| format!("{name}: {e}")));
    }
    println!("{count} byte operations compared with the host CPU");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn wider_operations_on_edges_and_random_values() {
    let mut random = Random::new(1);
    let mut wrong = Vec::new();
    let mut count = 0u64;
    for (name, code, model) in CHECKS.iter().filter(|c| host_has(c.0)) {
        for &w in code.widths().iter().filter(|w| **w != Width::B && has_width(name, **w)) {
            let mut host = Host::new(64).expect("a 64-bit host");
            let bytes = code.bytes(w);
            host.load(&bytes);
            let mut found = None;
            for i in 0..20_000 {
                let mut values = [random.edgy(), random.edgy(), random.edgy()];
                // Most random divisions overflow: let most high halves be smaller than the divisor, or a sign extension.
                if name.ends_with("div") && i % 8 != 0 {
                    let divisor = w.cut(values[1]).max(1);
                    values[2] =
                        if i % 3 == 0 { w.sign_extend(values[0]) >> 63 } else { (values[2] % divisor) >> (i & 1) };
                    values[2] = if i % 3 == 0 { values[2].wrapping_neg() } else { values[2] };
                }
                count += 1;
                if let Err(e) = compare(&mut host, *model, w, values, Rflags::from_bits_retain(OLD[i & 3])) {
                    found.get_or_insert(e);
                }
            }
            wrong.extend(found.map(|e| format!("{name}: {e}")));
        }
    }
    println!("{count} wider operations compared with the host CPU");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
