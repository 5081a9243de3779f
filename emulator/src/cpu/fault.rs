//! Exceptions: vector and error code (SDM 3A 6.3, 6.15).

/// An exception raised by an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// #DE, vector 0: divide error.
    De,
    /// #DB, vector 1: debug; the causes as bits of DR6.
    Db(u64),
    /// #BP, vector 3: INT3 (a trap: RIP past the instruction).
    Bp,
    /// #OF, vector 4: INTO (a trap).
    Of,
    /// #BR, vector 5: BOUND.
    Br,
    /// #UD, vector 6: invalid opcode.
    Ud,
    /// #NM, vector 7: no math coprocessor.
    Nm,
    /// #DF, vector 8: double fault.
    Df,
    /// #TS, vector 10: invalid TSS.
    Ts(u16),
    /// #NP, vector 11: segment not present.
    Np(u16),
    /// #SS, vector 12: stack fault.
    Ss(u16),
    /// #GP, vector 13: general protection.
    Gp(u16),
    /// #PF, vector 14: page fault.
    Pf {
        /// The faulting linear address, for CR2.
        addr: u64,
        /// The error code: P 1, W/R 2, U/S 4, RSVD 8, I/D 16, PK 32.
        code: u16,
    },
    /// #MF, vector 16: x87 floating-point error.
    Mf,
    /// #AC, vector 17: alignment check.
    Ac,
    /// #XM, vector 19: SIMD floating-point exception.
    Xm,
}

impl Fault {
    /// The vector.
    pub fn vector(self) -> u8 {
        match self {
            Fault::De => 0,
            Fault::Db(_) => 1,
            Fault::Bp => 3,
            Fault::Of => 4,
            Fault::Br => 5,
            Fault::Ud => 6,
            Fault::Nm => 7,
            Fault::Df => 8,
            Fault::Ts(_) => 10,
            Fault::Np(_) => 11,
            Fault::Ss(_) => 12,
            Fault::Gp(_) => 13,
            Fault::Pf { .. } => 14,
            Fault::Mf => 16,
            Fault::Ac => 17,
            Fault::Xm => 19,
        }
    }

    /// The error code, for the vectors that push one.
    pub fn error_code(self) -> Option<u16> {
        match self {
            Fault::Df | Fault::Ac => Some(0),
            Fault::Ts(c) | Fault::Np(c) | Fault::Ss(c) | Fault::Gp(c) | Fault::Pf { code: c, .. } => Some(c),
            _ => None,
        }
    }

    /// Is it a trap: reported with RIP after the instruction? #DB may be either and is reported where it was raised.
    pub fn is_trap(self) -> bool {
        matches!(self, Fault::Bp | Fault::Of)
    }
}
