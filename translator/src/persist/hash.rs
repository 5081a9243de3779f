//! A sum of bytes in two lanes of 64 bits: fast, and good against accidents, not against malice.

/// The sum.
pub type Sum = [u64; 2];

const K: [u64; 4] = [0x9e37_79b9_7f4a_7c15, 0xe703_7ed1_a0b4_28db, 0x8ebc_6af0_9c88_c6e3, 0x5899_65cc_7537_4cc3];

fn fold(a: u64, b: u64) -> u64 {
    let wide = u128::from(a) * u128::from(b);
    wide as u64 ^ (wide >> 64) as u64
}

/// The sum of some bytes.
pub fn sum(bytes: &[u8]) -> Sum {
    let word = |c: &[u8]| c.try_into().map_or(0, u64::from_le_bytes);
    let (mut a, mut b) = (K[0] ^ bytes.len() as u64, K[1]);
    let mut add = |x: u64, y: u64| {
        a = fold(a ^ x, y ^ K[2]);
        b = (b ^ x).rotate_left(29).wrapping_mul(K[3]).wrapping_add(y) ^ a;
    };
    // Four chains at once: one waits for its multiplications.
    let mut lines = bytes.chunks_exact(64);
    let mut lanes = K;
    for line in &mut lines {
        for (i, (lane, c)) in lanes.iter_mut().zip(line.chunks_exact(16)).enumerate() {
            *lane = fold(*lane ^ word(&c[..8]), word(&c[8..]) ^ K[3 - i]).wrapping_add(lane.rotate_left(23));
        }
    }
    if bytes.len() >= 64 {
        add(lanes[0], lanes[1]);
        add(lanes[2], lanes[3]);
    }
    let mut chunks = lines.remainder().chunks_exact(16);
    for c in &mut chunks {
        add(word(&c[..8]), word(&c[8..]));
    }
    let mut tail = [0; 16];
    tail[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    add(word(&tail[..8]), word(&tail[8..]));
    [fold(a, K[1] ^ b), fold(b ^ K[0], a | 1)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_bit_and_the_length_count() {
        let mut seen = HashSet::new();
        let mut bytes = vec![0u8; 4096];
        for len in 0..200 {
            assert!(seen.insert(sum(&bytes[..len])[0]), "{len} zeros");
        }
        for bit in 0..4096 * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            let s = sum(&bytes);
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(seen.insert(s[0]) && seen.insert(s[1]), "bit {bit}");
        }
    }
}
