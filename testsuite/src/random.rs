//! Random numbers that find bugs: reproducible, edges often.

/// xorshift64*.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed; 0 is as good as any other.
    pub fn new(seed: u64) -> Random {
        Random(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    /// Any 64 bits.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    /// True once in `n`.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of a list that is not empty.
    pub fn one_of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }

    /// Edges appear often: small values, values near powers of two, their complements.
    pub fn edgy(&mut self) -> u64 {
        let (kind, v) = (self.next() >> 60, self.next());
        match kind {
            0 => v & 0xff,
            1 => (v & 0xff).wrapping_neg(),
            2 => 1 << (v & 63),
            3 => (1 << (v & 63)) - 1,
            4 => !(1 << (v & 63)),
            5 => [0, u64::MAX, 0x80, 0x8000, 0x8000_0000, 1 << 63, 0x7f, 0x7fff_ffff_ffff_ffff][v as usize & 7],
            6 => v & v.rotate_left(17) & v.rotate_left(40),
            7 => v | v.rotate_left(17) | v.rotate_left(40),
            8 => v >> (v & 63),
            _ => v,
        }
    }
}
