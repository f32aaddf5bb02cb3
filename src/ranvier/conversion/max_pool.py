"""Max-pooling moves in front of activations, and over time pools running sums: it is to be that of the averages."""

import copy

from torch import fx

from ranvier.conversion.draft import free_path
from ranvier.conversion.vocabulary import FUNCTIONS, MAX_POOLS, is_rearrangement, is_site, max_pool_of_sums


def pool_before_activations(module: fx.GraphModule) -> None:
    """Let each max-pooling and the activation before it change places.

        maxpool(activation(x)) = activation(maxpool(x))

    exactly, since activations never decrease and padding is never the maximum. Neurons so send what was pooled, in
    whole spikes. Pooling passes concatenations of channels and rearrangements on its way. Where something else uses the
    activation, too, the pooled values get an activation of their own. Pooling of currents, of the image, or of what
    activations were combined to stays. All become `max_pool_of_sums`, which is the same for the ANN.

    Args:
        module: From `translate`; changed in place.
    """
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in MAX_POOLS:
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(_Pooling(module, node).of(node.args[0]))
            module.graph.eliminate_dead_code()
    names = {FUNCTIONS[name]: name for name in FUNCTIONS}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in MAX_POOLS:
            source, *settings = node.args
            node.target, node.args = max_pool_of_sums, (source, names[node.target], *settings)
    module.delete_all_unused_submodules()
    module.recompile()


class _Pooling:
    """A max-pooling of a graph, on its way to where it belongs."""

    def __init__(self, module: fx.GraphModule, pool: fx.Node) -> None:
        self.module = module
        self.pool = pool
        self.moved: set[fx.Node] = set()

    def of(self, x: fx.Node) -> fx.Node:
        """The maxima of `x`."""
        graph = self.module.graph
        if x.target is FUNCTIONS["cat"] and x.args[1] == 1:
            parts = {part: self.of(part) for part in x.all_input_nodes}
            return graph.node_copy(x, parts.__getitem__)
        site = x
        while is_rearrangement(site):
            site = site.all_input_nodes[0]
        if is_site(site, self.module):
            return self._activation(site, self._maxima(self._without(site, x)))
        return self._maxima(x)

    def _maxima(self, x: fx.Node) -> fx.Node:
        return self.module.graph.node_copy(self.pool, lambda _: x)

    def _without(self, site: fx.Node, x: fx.Node) -> fx.Node:
        """`x`, a rearrangement of what `site` returns, of what it receives."""
        if x is site:
            return site.all_input_nodes[0]
        return self.module.graph.node_copy(x, lambda source: self._without(site, source))

    def _activation(self, site: fx.Node, current: fx.Node) -> fx.Node:
        """The activation `site` of `current`: itself where it is used for nothing else, or a copy."""
        path = str(site.target)
        if site in self.moved or not self._serves_only_this(site):
            taken = [node.target for node in self.module.graph.nodes if node.op in ("call_module", "get_attr")]
            path = free_path(path, taken)
            self.module.add_submodule(path, copy.deepcopy(self.module.get_submodule(str(site.target))))
        self.moved.add(site)
        return self.module.graph.call_module(path, (current,))

    def _serves_only_this(self, node: fx.Node) -> bool:
        return node is self.pool or (bool(node.users) and all(map(self._serves_only_this, node.users)))
