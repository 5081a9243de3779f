//! What is known of an instruction's operands when its function is compiled.
//!
//! Frequent functions are compiled once for each frequent [`Shape`] (widths and kinds of the first two operands), which leaves no
//! question about them to be asked at run time, and once for [`Any`]. The text of the function is the same one.

use crate::isa::{Base, Insn, Operand, Seg, Width};

/// What an operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Not known.
    Any,
    /// There is none.
    None,
    /// A general-purpose register, not AH to BH.
    Reg,
    /// An immediate.
    Imm,
    /// Memory at a register and a displacement, by 64-bit addresses in a segment other than FS and GS.
    Base,
    /// Memory.
    Mem,
}

/// The operands of an instruction.
pub trait Shape {
    /// Of the operation and of operand 0, and of operand 1, where they are known; then there is no LOCK prefix either.
    const WIDTHS: Option<[Width; 2]>;
    /// Of operands 0 and 1.
    const KINDS: [Kind; 2];
}

/// Nothing is known.
pub struct Any;

impl Shape for Any {
    const WIDTHS: Option<[Width; 2]> = None;
    const KINDS: [Kind; 2] = [Kind::Any; 2];
}

/// Everything is known: widths `W` and `V` of operands 0 and 1, their kinds `A` and `B`.
pub struct Known<const W: u8, const V: u8, const A: u8, const B: u8>;

impl<const W: u8, const V: u8, const A: u8, const B: u8> Shape for Known<W, V, A, B> {
    const WIDTHS: Option<[Width; 2]> = Some([width(W), width(V)]);
    const KINDS: [Kind; 2] = [kind(A), kind(B)];
}

const fn width(n: u8) -> Width {
    [Width::B, Width::W, Width::D, Width::Q][n as usize]
}

const fn kind(n: u8) -> Kind {
    [Kind::Any, Kind::None, Kind::Reg, Kind::Imm, Kind::Base, Kind::Mem][n as usize]
}

/// Widths and kinds of the first two operands; [`Kind::Any`] where something is out of the ordinary.
pub fn of(i: &Insn) -> (Width, Width, Kind, Kind) {
    let w = i.width;
    let v = i.op_widths[1].unwrap_or(w);
    if i.op_widths[0].is_some_and(|a| a != w) || i.iced.has_lock_prefix() {
        return (w, v, Kind::Any, Kind::Any);
    }
    (w, v, kind_of(&i.ops[0]), kind_of(&i.ops[1]))
}

fn kind_of(operand: &Operand) -> Kind {
    match operand {
        Operand::None => Kind::None,
        Operand::Reg(_) => Kind::Reg,
        Operand::Imm(_) => Kind::Imm,
        Operand::Mem(m) => match m.base {
            Base::Reg(_) if m.index.is_none() && m.address == Width::Q && !matches!(m.seg, Seg::Fs | Seg::Gs) => {
                Kind::Base
            }
            _ => Kind::Mem,
        },
        Operand::HighByte(_) | Operand::Other => Kind::Any,
    }
}

/// The instance of a generic function for the shape of an instruction, out of a list of `(width, width of operand 1, kind, kind)`.
macro_rules! instance {
    ($i:expr, $module:ident::$function:ident, $(($w:ident $v:ident $a:ident $b:ident))*) => {
        match crate::interp::shape::of($i) {
            $((Width::$w, Width::$v, Kind::$a, Kind::$b) =>
                $module::$function::<Known<{ Width::$w as u8 }, { Width::$v as u8 }, { Kind::$a as u8 }, { Kind::$b as u8 }>>,)*
            _ => $module::$function::<Any>,
        }
    };
}

/// For two operands of the same width, the second perhaps an immediate.
macro_rules! two {
    ($i:expr, $module:ident::$function:ident) => {
        instance!($i, $module::$function,
            (B B Reg Reg) (B B Reg Imm) (B B Reg Base) (B B Reg Mem) (B B Base Reg) (B B Mem Reg) (B B Base Imm) (B B Mem Imm)
            (D D Reg Reg) (D D Reg Imm) (D D Reg Base) (D D Reg Mem) (D D Base Reg) (D D Mem Reg) (D D Base Imm) (D D Mem Imm)
            (Q Q Reg Reg) (Q Q Reg Imm) (Q Q Reg Base) (Q Q Reg Mem) (Q Q Base Reg) (Q Q Mem Reg) (Q Q Base Imm) (Q Q Mem Imm))
    };
}

/// For a register and a second operand that may be narrower.
macro_rules! wider {
    ($i:expr, $module:ident::$function:ident) => {
        instance!($i, $module::$function,
            (D B Reg Reg) (D B Reg Base) (D B Reg Mem) (D W Reg Reg) (D W Reg Base) (D W Reg Mem)
            (Q B Reg Reg) (Q B Reg Base) (Q B Reg Mem) (Q W Reg Reg) (Q W Reg Base) (Q W Reg Mem)
            (Q D Reg Reg) (Q D Reg Base) (Q D Reg Mem) (D D Reg Reg) (D D Reg Base) (D D Reg Mem)
            (Q Q Reg Reg) (Q Q Reg Base) (Q Q Reg Mem))
    };
}

/// For shifts: the count is an immediate or CL.
macro_rules! shift {
    ($i:expr, $module:ident::$function:ident) => {
        instance!($i, $module::$function, (B B Reg Imm) (D D Reg Imm) (Q Q Reg Imm) (D B Reg Reg) (Q B Reg Reg))
    };
}

/// For one operand.
macro_rules! one {
    ($i:expr, $module:ident::$function:ident) => {
        instance!($i, $module::$function,
            (B B Reg None) (D D Reg None) (Q Q Reg None) (D D Base None) (D D Mem None) (Q Q Base None) (Q Q Mem None)
            (Q Q Imm None))
    };
}

pub(super) use {instance, one, shift, two, wider};
