//! The digests that request signatures need. TLS has its own (`http.rs`).

use hmac::{Hmac, KeyInit, Mac};
use object_store::client::{
    CryptoProvider, DigestAlgorithm, DigestContext, HmacContext, Signer, SigningAlgorithm,
};
use sha2::{Digest, Sha256};

/// SHA-256 and its HMAC in Rust; with the CPU's instructions where it has them.
#[derive(Debug)]
pub(super) struct Crypto;

struct Hashing {
    state: Sha256,
    digest: [u8; 32],
}

struct Signing {
    state: Hmac<Sha256>,
    digest: [u8; 32],
}

impl CryptoProvider for Crypto {
    fn digest(&self, algorithm: DigestAlgorithm) -> object_store::Result<Box<dyn DigestContext>> {
        check(&algorithm)?;
        Ok(Box::new(Hashing { state: Sha256::new(), digest: [0; 32] }))
    }

    fn hmac(&self, algorithm: DigestAlgorithm, secret: &[u8]) -> object_store::Result<Box<dyn HmacContext>> {
        check(&algorithm)?;
        let state = Hmac::new_from_slice(secret).expect("a key of HMAC may have any length");
        Ok(Box::new(Signing { state, digest: [0; 32] }))
    }

    fn sign(&self, _: SigningAlgorithm, _: &[u8]) -> object_store::Result<Box<dyn Signer>> {
        Err(object_store::Error::NotSupported { source: "S3 needs no RSA signatures".into() })
    }
}

fn check(algorithm: &DigestAlgorithm) -> object_store::Result<()> {
    match algorithm {
        DigestAlgorithm::Sha256 => Ok(()),
        other => Err(object_store::Error::NotSupported { source: format!("no {other:?} here").into() }),
    }
}

impl DigestContext for Hashing {
    fn update(&mut self, data: &[u8]) {
        self.state.update(data);
    }
    fn finish(&mut self) -> object_store::Result<&[u8]> {
        self.digest = self.state.finalize_reset().into();
        Ok(&self.digest)
    }
}

impl HmacContext for Signing {
    fn update(&mut self, data: &[u8]) {
        Mac::update(&mut self.state, data);
    }
    fn finish(&mut self) -> object_store::Result<&[u8]> {
        self.digest = self.state.clone().finalize().into_bytes().into();
        Ok(&self.digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn digests_are_those_of_the_standards() {
        // FIPS 180-2, "abc"; RFC 4231, test case 2.
        let mut digest = Crypto.digest(DigestAlgorithm::Sha256).unwrap();
        digest.update(b"a");
        digest.update(b"bc");
        assert_eq!(
            hex(digest.finish().unwrap()),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        let mut hmac = Crypto.hmac(DigestAlgorithm::Sha256, b"Jefe").unwrap();
        hmac.update(b"what do ya want for nothing?");
        assert_eq!(
            hex(hmac.finish().unwrap()),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }
}
