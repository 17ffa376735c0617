//! The real, stock Envoy answers what residuals say, through the bridge as it runs on a node.
//!
//! `make envoy` installs it. Without one the tests say so and pass, except on CI, where nothing is skipped.

mod authorizer;
mod client;
mod custom;
#[path = "../../../policy-compiler/tests/agreement/entropy.rs"]
mod entropy;
mod evade;
mod jail;
mod judged;
mod life;
mod named;
mod node;
mod random;
mod refused;
#[path = "../../../policy-compiler/tests/agreement/requests.rs"]
mod requests;
mod token;
mod tokens;
#[expect(dead_code, reason = "the compiler's tests ask for more than worlds")]
#[path = "../../../policy-compiler/tests/agreement/world.rs"]
mod world;
