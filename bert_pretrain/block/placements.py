"""PLACEMENTS: how branches, norms and residual sums combine. x is the state, f a branch, n its norm.

    post       x ← n(x + f(x))                                                               BERT
    pre        x ← x + f(n(x))                          out = final(x)                       2002.04745
    residual   x ← n(x + f(x)),  d ← d + f(x)           out = x + final(d),  d₀ = x₀         ResiDual, 2304.14802

A placement carries a tuple of tensors through the layers. Each branch reads what `enter` gives; `leave` adds its
output.
"""

from torch import Tensor, nn

from collate.views import at_least_float32

State = tuple[Tensor, ...]


class Post:
    has_final_norm = False

    def begin(self, hidden_TD: Tensor) -> State:
        """The state before the first layer."""
        return (hidden_TD,)

    def enter(self, state: State, norm: nn.Module) -> Tensor:
        """What a branch reads."""
        return state[0]

    def leave(self, state: State, norm: nn.Module, out_TD: Tensor) -> State:
        """The state with the output of the branch."""
        return (norm(out_TD + state[0]),)

    def end(self, state: State, final_norm: nn.Module | None) -> Tensor:
        """What the stack returns."""
        return state[0]


class Pre(Post):
    has_final_norm = True

    def enter(self, state: State, norm: nn.Module) -> Tensor:
        return norm(state[0])

    def leave(self, state: State, norm: nn.Module, out_TD: Tensor) -> State:
        return (state[0] + out_TD,)

    def end(self, state: State, final_norm: nn.Module | None) -> Tensor:
        assert final_norm is not None
        return final_norm(state[0])


class Residual(Post):
    """d is a sum over all branches: it stays in float32 at least, where 16 bits would lose the last ones."""

    has_final_norm = True

    def begin(self, hidden_TD: Tensor) -> State:
        return hidden_TD, at_least_float32(hidden_TD)

    def leave(self, state: State, norm: nn.Module, out_TD: Tensor) -> State:
        x_TD, d_TD = state
        return norm(out_TD + x_TD), d_TD + out_TD

    def end(self, state: State, final_norm: nn.Module | None) -> Tensor:
        x_TD, d_TD = state
        assert final_norm is not None
        return (x_TD + final_norm(d_TD)).to(x_TD.dtype)


PLACEMENTS: dict[str, Post] = {"post": Post(), "pre": Pre(), "residual": Residual()}
